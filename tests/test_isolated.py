"""What runs in img2dataset's environment, piece by piece: resolver tricks, robots.txt, consent, budget, decoder."""

import os
import signal
import socket
import threading
import time
import urllib.request
from dataclasses import replace

import pytest
from hostile import Canary, Server, answer, encoded

from solo.isolated import consent, probe, resizer, robots, web
from solo.isolated.address import is_public
from solo.isolated.budget import Budget
from solo.isolated.resizer import Decoder
from solo.isolated.rules import Failed, Rules, parse

RULES = Rules("TestBot/1.0 (bot@example.org)", "", "", timeout_s=1, deadline_s=3)


@pytest.fixture
def canary():
    one = Canary()
    yield one
    one.close()


def isolated_python():
    return os.environ.get("SOLO_IMG2DATASET") or resizer.DECODER.parents[2] / ".img2dataset/bin/python"


def guest(folder, **rules):
    return web.Guest(replace(RULES, shared=str(folder), **rules))


@pytest.mark.parametrize("n_public", [0, 1, 2, 3])
def test_a_resolver_that_changes_its_answer_reaches_nothing(tmp_path, monkeypatch, canary, n_public):
    answers, reached = ["93.184.216.34"] * n_public + ["127.0.0.1"] * 9, []

    def resolver(host, port, *_, **__):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answers.pop(0), port))]

    def connect(address, *_, **__):  # no test goes to the open web
        reached.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    monkeypatch.setattr(socket, "create_connection", connect)
    visit = guest(tmp_path).visit(f"http://rebound.test:{canary.port}/x.jpg")
    assert visit.failed.status == ("robots_unreachable" if n_public else "refused_address")
    assert {ip for ip, _ in reached} == ({"93.184.216.34"} if n_public else set())


def test_a_check_before_the_fetch_would_be_led_astray(monkeypatch, canary):
    """The twin of the test above: what asks the resolver once to judge and once to connect reaches the canary."""
    answers = ["93.184.216.34", "127.0.0.1"]

    def resolver(host, port, *_, **__):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answers.pop(0), int(port)))]

    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    judged = socket.getaddrinfo("rebound.test", canary.port)[0][4][0]
    assert is_public(judged)
    with urllib.request.urlopen(f"http://rebound.test:{canary.port}/x.jpg", timeout=2) as found:
        assert found.read().startswith(b"\xff\xd8")
    assert canary.n_connections == 1


def test_an_answer_of_mixed_addresses_leads_to_the_public_ones_alone(monkeypatch):
    from solo.isolated import address

    found = [(0, 0, 0, "", (ip, 80)) for ip in ("127.0.0.1", "93.184.216.34", "10.0.0.1", "::1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert address.Resolver(RULES).find(address.split("http://mixed.test/")) == [("93.184.216.34", 80)]


def test_proxies_of_the_environment_are_ignored(tmp_path, monkeypatch, canary):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{canary.port}")
    with Server({"/x.jpg": answer(encoded())}, {}) as server:
        mapped = (("good.test", "127.0.0.1", server.port),)
        assert guest(tmp_path, mapped=mapped).visit("http://good.test/x.jpg").failed is None
    assert canary.n_connections == 0


def test_a_mapped_host_is_mapped_on_port_80_of_http_alone(tmp_path, canary):
    one = guest(tmp_path, mapped=(("localhost", "127.0.0.1", canary.port),))
    for url in (f"http://localhost:{canary.port}/", "https://localhost/", "http://localhost:8080/"):
        assert one.visit(url).failed.status == "refused_address"
    assert canary.n_connections == 0


def test_one_connection_serves_many_requests_and_a_closed_one_is_replaced(tmp_path):
    with Server({"/x.jpg": answer(encoded())}, {}) as server:  # closes after each answer, unannounced
        one = guest(tmp_path, mapped=(("good.test", "127.0.0.1", server.port),))
        assert [one.visit("http://good.test/x.jpg").failed for _ in range(5)] == [None] * 5
        assert server.asked["good.test", "/robots.txt"] == 1


def test_retry_after_is_waited_for_and_a_long_one_is_left_to_a_later_pass(tmp_path):
    n_asked = []

    def busy(send, stop):
        n_asked.append(time.monotonic())
        first = len(n_asked) == 1
        send(answer(status="429 Busy", headers=["Retry-After: 1"]) if first else answer(encoded()))

    routes = {"/soon.jpg": busy, "/late.jpg": answer(status="503 No", headers=["Retry-After: 3600"])}
    with Server(routes, {}) as server:
        one = guest(tmp_path, mapped=(("good.test", "127.0.0.1", server.port),), retry_after_s=2)
        visit = one.visit("http://good.test/soon.jpg")
        assert visit.failed is None and visit.n_tries == 2 and n_asked[1] - n_asked[0] >= 1
        late = one.visit("http://good.test/late.jpg")
        assert (late.failed.status, late.n_tries, late.headers["retry-after"]) == ("http_5xx", 1, "3600")
        assert server.asked["good.test", "/late.jpg"] == 1


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("5", 5),
        ("0", 0),
        ("-3", 0),
        ("", None),
        ("soon", None),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 90),
        ("9" * 400, 1e11),
    ],
)
def test_retry_after_is_seconds_or_a_date(value, seconds):
    found = web.retry_after(value, 10.0)
    assert found == seconds if seconds is None or seconds < 1e9 else found > 1e9


def test_a_budget_holds_over_threads(tmp_path):
    starts, most, now = [], [0], [0]
    lock = threading.Lock()

    def work(budget):
        with budget.request("a.test"):
            with lock:
                starts.append(time.time())
                now[0] += 1
                most[0] = max(most[0], now[0])
            time.sleep(0.03)
            with lock:
                now[0] -= 1

    budgets = [Budget(str(tmp_path), 2, 50.0) for _ in range(2)]  # as two processes would have
    threads = [threading.Thread(target=work, args=(budgets[i % 2],)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    starts.sort()
    assert len(starts) == 12 and most[0] <= 2
    assert starts[-1] - starts[0] >= 11 / 50 * 0.9


def test_a_pause_holds_for_one_host(tmp_path):
    budget = Budget(str(tmp_path), None, None)
    budget.pause("a.test", 0.3)
    began = time.monotonic()
    with budget.request("b.test"):
        assert time.monotonic() - began < 0.2
    with budget.request("a.test"):
        assert time.monotonic() - began >= 0.25


@pytest.mark.parametrize(
    ("text", "path", "forbidden"),
    [
        ("", "/a", False),
        ("Disallow: /", "/a", False),  # a rule before any group names nobody
        ("User-agent: *\nDisallow: /", "/", True),
        ("User-agent: *\nDisallow:", "/", False),
        ("User-agent: *\nDisallow: /a\nAllow: /a", "/a", False),  # allow wins a tie
        ("User-agent: *\nDisallow: /a/b\nAllow: /a", "/a/b/c", True),
        ("User-agent: *\nDisallow: /*.jpg$", "/x/y.jpg", True),
        ("User-agent: *\nDisallow: /*.jpg$", "/x/y.jpg?z", False),
        ("User-agent: *\nDisallow: /a*b*c", "/a1b2c3", True),
        ("User-agent: *\nDisallow: /a*b*c", "/a1c2b3", False),
        ("User-agent: *\nDisallow: /\u00fc", "/%C3%BC.jpg", True),
        ("User-agent: *\nDisallow: /%7ejoe/", "/~joe/x", True),
        ("User-agent: a\nUser-agent: TESTBOT/2\nDisallow: /", "/x", True),
        ("User-agent: testbot\nDisallow: /a\n\nUser-agent: *\nDisallow: /b", "/b", False),
        (
            "User-agent: testbot\nDisallow: /a\nUser-agent: x\nDisallow: /\nUser-agent: testbot\nDisallow: /c",
            "/c",
            True,
        ),
        ("user-agent:*\r\ndisallow:/a#b", "/a", True),
        ("User-agent: *\nCrawl-delay: 5\nDisallow: /a", "/a", True),
        ("<html>User-agent: *\nDisallow: /</html>", "/", False),
    ],
)
def test_robots_rules(text, path, forbidden):
    assert bool(robots.parse(text, "testbot").forbids(path)) is bool(forbidden)


def test_a_crawl_delay_is_kept_within_reason():
    delays = [robots.parse(f"User-agent: *\nCrawl-delay: {v}", "t").delay_s for v in ("2", "1e9", "-4", "soon", "nan")]
    assert delays == [2, robots.MAX_DELAY_S, 0, 0, 0]


def test_stars_cost_linear_time():
    rule = robots.parse("User-agent: *\nDisallow: /" + "*a" * 5_000 + "$", "t")
    began = time.process_time()
    assert rule.forbids("/" + "a" * 9_000 + "b") is None and rule.forbids("/" + "a" * 9_000)
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("value", "refused"),
    [
        ("noai", True),
        ("testbot:noimageai", True),
        ("otherbot: noai", False),
        ("otherbot: noai, testbot: none", True),
        ("max-image-preview: none, noai", True),
        ("max-image-preview: none", False),
        ("unavailable_after: Wed, 03 Dec 2031 13:09:53 GMT", False),
        ("noaim", False),
        ("", False),
    ],
)
def test_x_robots_tag(value, refused):
    assert bool(consent.refusal([("x-robots-tag", value)], "testbot")) is refused


def test_a_decoder_that_dies_costs_one_picture(monkeypatch):
    decoder, data, seen = Decoder(), encoded("PNG", (64, 48)), probe.Probe("png", 64, 48)
    monkeypatch.setattr(resizer.sys, "executable", str(isolated_python()))
    first = decoder.ask(data, 32, seen)
    assert first[1:] == (32, 24, 64, 48) and first[0].startswith(b"\xff\xd8")
    with pytest.raises(Failed, match="undecodable"):
        decoder.ask(data[:-20], 32, seen)
    pid = decoder._process.pid
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
    with pytest.raises(Failed, match="decoder_died"):
        decoder.ask(data, 32, seen)
    assert decoder.ask(data, 32, seen) == first and decoder._process.pid != pid
    monkeypatch.setattr(resizer, "DECODE_S", 0.2)
    os.kill(decoder._process.pid, signal.SIGSTOP)
    with pytest.raises(Failed, match=r"took over 0.2 s"):
        decoder.ask(data, 32, seen)
    monkeypatch.setattr(resizer, "DECODE_S", 30)
    assert decoder.ask(data, 32, seen) == first
    decoder._stop()


def test_rules_survive_the_way_to_the_worker():
    rules = replace(RULES, mapped=(("a.test", "127.0.0.1", 8123),), formats=("jpeg",), host_concurrency=3)
    assert parse(rules.dump()) == rules and rules.token == "testbot"


def test_probe_agrees_with_pillow_on_sizes():
    for form in ("JPEG", "PNG", "GIF", "WEBP"):
        for size in ((1, 1), (48, 32), (300, 7)):
            found = probe.probe(encoded(form, size), RULES)
            assert (found.format, found.width, found.height, found.n_frames) == (form.lower(), *size, 1)
    frames = encoded("PNG", (9, 9))
    assert probe.probe(frames, RULES).n_frames == 1
