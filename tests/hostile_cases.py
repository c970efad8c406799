"""The cases: class, URL, caption, the only status it may end with (or a tuple of them), by what the server does."""

from urllib.parse import quote

from hostile import answer, encoded, mutated
from hostile_answers import BOMBS, CONSENTS, FOREIGN, MUTATED, OK, OPT_OUTS, transfers
from hostile_hosts import HOSTS, NETWORKS, NO_URL, ODD_PATHS, ROBOTS, SCHEMES, SPELLED, redirects

GOOD = "http://good.test"
MAX_BYTES, MAX_PIXELS = 1 << 20, 25_000_000


def served(routes, kind, found):
    """Put answers behind paths and give the cases that ask for them."""
    cases = []
    for i, (name, (route, status)) in enumerate(found.items()):
        path = f"/{kind}/{i}-{name}"
        routes[path] = route
        cases.append((kind, GOOD + path, "c", status))
    return cases


def build(canary):
    """(cases, routes, robots) with the canary's port in all that leads to it."""
    port = str(canary)
    routes = {
        "/ok.jpg": answer(OK),
        "/x.jpg": answer(OK),
        "/y.jpg": answer(OK),
        "/p/ok.jpg": answer(OK),
        "/x.gif": answer(OK),
    }
    routes["/" + "a" * 2_000 + "b"] = answer(OK)
    cases = [("ssrf", f"http://{host}:{port}/x.jpg", "c", "refused_address") for host in SPELLED]
    cases += [("ssrf", f"http://{host}/x.jpg", "c", "refused_address") for host in NETWORKS]
    cases += [("url", url, "c", "bad_record") for url in NO_URL]
    cases += [("scheme", url.replace("CANARY", port), "c", "refused_scheme") for url in SCHEMES]
    cases += served(routes, "redirect", redirects(port))
    for n in range(1, 8):
        routes[f"/chain/{n}"] = answer(status="302 Go", headers=[f"Location: /chain/{n - 1}"])
    routes["/chain/0"] = answer(OK)
    cases += [("redirect", f"{GOOD}/chain/{n}", "c", "ok" if n <= 5 else "http_3xx") for n in range(1, 8)]
    for kind, found in transfers():
        cases += served(routes, kind, found)
    cases += served(routes, "bomb", {name: (answer(data), status) for name, (data, status) in BOMBS.items()})
    foreign = {name: (answer(data, ["Content-Type: image/jpeg"]), status) for name, (data, status) in FOREIGN.items()}
    cases += served(routes, "label", foreign)
    right = {
        form: (answer(encoded(form), ["Content-Type: text/html"]), "ok") for form in ("JPEG", "PNG", "WEBP", "GIF")
    }
    cases += served(routes, "label", right)
    for form in ("JPEG", "PNG", "WEBP", "GIF"):
        some = {str(i): (answer(mutated(encoded(form), i)), MUTATED) for i in range(16)}
        cases += served(routes, f"mutated-{form}", some)
    cases += served(routes, "opt-out", {str(i): (answer(OK, h), "disallowed") for i, h in enumerate(OPT_OUTS)})
    cases += served(routes, "consent", {str(i): (answer(OK, h), "ok") for i, h in enumerate(CONSENTS)})
    cases += [("robots", f"http://{host}{path}", "c", s) for host, paths in HOSTS.items() for path, s in paths.items()]
    for path in ODD_PATHS:
        routes[quote(path.partition("#")[0], safe="/%:@!$&'()*+,;=~-._?")] = answer(OK)
        cases.append(("unicode", GOOD + path, "c", "ok"))
    cases += [
        ("caption", f"{GOOD}/ok.jpg", text, "ok")
        for text in ("x" * (1 << 20), "\0\x1b[31m", "\u202e\U0001f408", "</s>")
    ]
    cases += [("caption", f"{GOOD}/ok.jpg", text, "empty") for text in ("", " \n\t")]
    cases += [
        ("repeat", f"{GOOD}/ok.jpg", "</s>", "duplicate_row"),
        ("dns", "http://no-such-host.invalid/x.jpg", "c", "dns"),
    ]
    robots = {
        host: route.replace(b"CANARY", port.encode()) if isinstance(route, bytes) else route
        for host, route in ROBOTS.items()
    }
    return cases, routes, robots
