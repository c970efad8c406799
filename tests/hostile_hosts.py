"""Where hostile URLs lead: addresses, schemes, redirects, and robots.txt with what each allows."""

# ruff: noqa: SIM905 - forty addresses read better in a block

from hostile import Endless, answer, hang, zipped
from hostile_answers import OK

SPELLED = """
127.0.0.1 127.1 127.0.1 0 0.0.0.0 0x7f000001 0x7F.0.0.1 0x7f.1 0177.0.0.1 017700000001 2130706433 127.0.0.1. localhost
LOCALHOST localhost. [::1] [::] [::ffff:127.0.0.1] [::ffff:7f00:1] [0:0:0:0:0:ffff:127.0.0.1] [64:ff9b::127.0.0.1]
[64:ff9b:1::7f00:1] [2002:7f00:1::] [::127.0.0.1] [fe80::1%25lo] [fd00::1] \u2460\u2461\u2466.\u24ea.\u24ea.\u2460
127\u30020\u30020\u30021 \uff11\uff12\uff17.0.0.1 user@127.0.0.1 user:pw@127.0.0.1 good.test@127.0.0.1
good.test:80@127.0.0.1 user@good.test good.test\\@127.0.0.1
""".split()
NETWORKS = """
169.254.169.254 [fd00:ec2::254] 10.0.0.1 172.16.0.1 192.168.1.1 100.64.0.1 192.0.0.1 198.18.0.1 224.0.0.1 240.0.0.1
255.255.255.255 [ff02::1] [2001:db8::1] [2001::1] 0.1.2.3 198.51.100.7 203.0.113.9
""".split()
NO_URL = [
    *(
        "no scheme at all",
        "//127.0.0.1/x.jpg",
        "http:127.0.0.1",
        "http:/127.0.0.1",
        "http:///x.jpg",
        "http://",
        "http://a b/",
    ),
    *("http://127.0.0.1:port/", "http://good.test:99999/", "http://good.test:0/", "http://good.test:-1/"),
    *("http://127.0.0.1%2f.good.test/", "http://127.0.0.1%00.good.test/", "http://[::1/", "http://[127.0.0.1]/"),
    *(
        "http://good..test/",
        "http://-good.test/",
        f"http://{'x' * 70}.test/",
        "http://good.test/\r\nX: y",
        "http://good.test/\0",
    ),
    *(
        "http://good.test/a\tb",
        f"http://good.test/{'x' * 9000}",
        "",
        "   ",
        "http://\u202egood.test/",
        "http://good\u2100.test/",
    ),
]
SCHEMES = """
file:///etc/hostname file://localhost/etc/hostname FILE:///etc/hostname file:/etc/hostname
data:image/gif;base64,R0lGODlhAQABAAAAACw= data:,x ftp://127.0.0.1:CANARY/a.jpg ftps://good.test/a
gopher://127.0.0.1:CANARY/ jar:http://good.test/!/a javascript:alert(1) ws://good.test/ blob:http://good.test/a
dict://127.0.0.1:CANARY/ ldap://127.0.0.1:CANARY/ s3://bucket/a.jpg view-source:http://good.test/
""".split()
ODD_PATHS = [
    "/\u00fc.jpg",
    "/\u732b/\U0001f408.jpg",
    "/a b.jpg",
    "/\u202egpj.exe",
    "/%FF%fe.jpg",
    "/a%2Fb.jpg",
    "/a?q=\u00e9&r=%20#f",
    "/'\"<>`{}|.jpg",
]
ROBOTS = {
    "none.test": answer(status="404 None"),
    "forbidden.test": answer(status="403 No"),
    "all.test": answer(b"User-agent: *\nDisallow: /\n"),
    "ours.test": answer(b"User-agent: *\nAllow: /\n\nUser-agent: TestBot\nDisallow: /\n"),
    "theirs.test": answer(b"User-agent: otherbot\nDisallow: /\n\nUser-agent: *\nDisallow:\n"),
    "longest.test": answer(b"User-agent: *\nDisallow: /p/\nAllow: /p/ok.jpg$\nDisallow: /*.gif\n"),
    "broken.test": answer(status="500 No"),
    "busy.test": answer(status="503 No", headers=["Retry-After: 3600"]),
    "limited.test": answer(status="429 No", headers=["Retry-After: 3600"]),
    "hanging.test": hang,
    "inward.test": answer(status="302 Go", headers=["Location: http://127.0.0.1:CANARY/robots.txt"]),
    "looping.test": answer(status="302 Go", headers=["Location: /robots.txt"]),
    "endless.test": Endless(answer(length=False), b"# padding\n"),
    "late.test": answer(b"# padding\n" * 60_000 + b"User-agent: *\nDisallow: /\n"),
    "binary.test": answer(bytes(range(256)) * 20),
    "bom.test": answer(b"\xef\xbb\xbfUSER-AGENT : *\r\nDISALLOW : /x.jpg # why\r\n"),
    "zipped.test": answer(zipped(b"User-agent: *\nDisallow: /\n"), ["Content-Encoding: gzip"]),
    "stars.test": answer(b"User-agent: *\nDisallow: /" + b"*a" * 3_000 + b"$\n"),
}
HOSTS = {
    "none.test": {"/x.jpg": "ok"},
    "forbidden.test": {"/x.jpg": "ok"},
    "all.test": {"/x.jpg": "disallowed", "/": "disallowed"},
    "ours.test": {"/x.jpg": "disallowed"},
    "theirs.test": {"/x.jpg": "ok"},
    "longest.test": {"/p/x.jpg": "disallowed", "/p/ok.jpg": "ok", "/x.gif": "disallowed", "/x.jpg": "ok"},
    "broken.test": {"/x.jpg": "robots_unreachable"},
    "busy.test": {"/x.jpg": "robots_unreachable"},
    "limited.test": {"/x.jpg": "robots_unreachable"},
    "hanging.test": {"/x.jpg": "robots_unreachable"},
    "inward.test": {"/x.jpg": "robots_unreachable"},
    "looping.test": {"/x.jpg": "ok"},
    "endless.test": {"/x.jpg": "ok"},
    "late.test": {"/x.jpg": "ok"},
    "binary.test": {"/x.jpg": "ok"},
    "bom.test": {"/x.jpg": "disallowed", "/y.jpg": "ok"},
    "zipped.test": {"/x.jpg": "disallowed"},
    "stars.test": {"/" + "a" * 2_000 + "b": "ok", "/" + "a" * 4_000: "disallowed"},
}


def redirects(canary):
    """Answers that lead elsewhere."""
    private, go = f"http://127.0.0.1:{canary}/x.jpg", "302 Go"

    def to(where, status=go):
        return answer(status=status, headers=[f"Location: {where}"])

    found = {str(n): (to(private, f"{n} Go"), "refused_address") for n in (301, 302, 303, 307, 308)}
    inward = [
        f"//127.0.0.1:{canary}/",
        f"http://2130706433:{canary}/",
        f"http://[::1]:{canary}/",
        f"http://localhost:{canary}",
    ]
    inward += [
        f"http://0x7f.1:{canary}/",
        "http://169.254.169.254/latest",
        f"http://u:p@127.0.0.1:{canary}/",
        "http://u@good.test/",
    ]
    found |= {f"inward-{i}": (to(where), "refused_address") for i, where in enumerate(inward)}
    schemes = [
        "file:///etc/hostname",
        "data:image/gif;base64,R0lGODlhAQABAAAAACw=",
        f"ftp://127.0.0.1:{canary}/",
        "javascript:1",
    ]
    found |= {f"scheme-{i}": (to(where), "refused_scheme") for i, where in enumerate(schemes)}
    found |= {
        "none": (answer(status=go), "http_3xx"),
        "empty": (to(""), "http_3xx"),
        "loop": (to("1-loop"), "http_404"),
        "self": (to("?"), "http_3xx"),
        "long": (to("/" + "x" * 9_000), "bad_record"),
        "control": (to("/\x01"), "bad_record"),
        "latin": (to("/\xe9.jpg"), "http_404"),
        "no-host": (to("http:///x"), "http_404"),
        "refresh": (answer(b"<html>", [f"Refresh: 0; url={private}"]), "not_image"),
        "link": (answer(OK, [f"Link: <{private}>; rel=canonical", f"Content-Location: {private}"]), "ok"),
        "opted-out": (answer(status=go, headers=["Location: /ok.jpg", "X-Robots-Tag: noai"]), "disallowed"),
        "to-forbidden": (to("http://all.test/x.jpg"), "disallowed"),
        "to-opted-out": (to("/opt-out/0-0"), "disallowed"),
    }
    return found
