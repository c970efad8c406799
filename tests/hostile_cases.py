"""The cases: class, URL, caption, the only status it may end with (or a tuple of them), by what the server does."""

# ruff: noqa: SIM905 - forty addresses read better in a block

import hashlib
import zlib
from urllib.parse import quote

from hostile import (
    PAD,
    Drip,
    Endless,
    answer,
    chunk,
    encoded,
    gif,
    hang,
    jpeg_of,
    mutated,
    png,
    raw_deflate,
    reset,
    webp,
    zipped,
)

GOOD = "http://good.test"
OK = encoded()
MAX_BYTES, MAX_PIXELS = 1 << 20, 25_000_000
LARGE = answer(OK + PAD * 20)  # 1.3 MB

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
OPT_OUTS = [
    ["X-Robots-Tag: noai"],
    ["x-robots-tag: NOAI"],
    ["X-Robots-Tag: noindex, noai"],
    ["X-Robots-Tag: none"],
    ["X-ROBOTS-TAG:noimageai"],
    ["X-Robots-Tag: testbot: noai"],
    ["X-Robots-Tag: otherbot: noindex, testbot: noai"],
    ["X-Robots-Tag: all", "X-Robots-Tag: noimageindex"],
    ["X-Robots-Tag: *: none"],
    ["X-Robots-Tag: max-image-preview:large; noai"],
    ["X-Robots-Tag: unavailable_after: 25 Jun 2030 15:00:00 PST", "X-Robots-Tag:\tnoindex"],
    ["tdm-reservation: 1"],
    ["TDM-Reservation:1"],
    ["X-Robots-Tag: nofollow,", " noai"],
    ["X-Robots-Tag: No-AI"],
    ["Content-Usage: train-ai=n"],
]
CONSENTS = [
    ["X-Robots-Tag: all"],
    ["X-Robots-Tag: otherbot: noai, noindex"],
    ["X-Robots-Tag: max-image-preview: none"],
    ["tdm-reservation: 0"],
    ["X-Robots-Tag: nofollow, nosnippet"],
    ["Content-Usage: train-ai=y"],
]
FOREIGN = {  # what is no picture, or none of the formats asked for
    "html": (b"<html><body>moved</body></html>", "not_image"),
    "json": (b'{"error": 1}', "not_image"),
    "pdf": (b"%PDF-1.7\n", "not_image"),
    "mp4": (b"\0\0\0\x18ftypmp42", "refused_format"),
    "zip": (b"PK\x03\x04" + bytes(40), "not_image"),
    "elf": (b"\x7fELF" + bytes(60), "not_image"),
    "pickle": (b"\x80\x04cos\nsystem\n.", "not_image"),
    "text": (b"hello", "not_image"),
    "zeros": (bytes(5000), "not_image"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/hostname'/></svg>", "refused_format"),
    "bmp": (encoded("BMP"), "refused_format"),
    "tiff": (encoded("TIFF"), "refused_format"),
    "jp2": (encoded("JPEG2000"), "refused_format"),
    "ico": (encoded("ICO"), "refused_format"),
    "avif": (b"\0\0\0\x20ftypavif" + bytes(40), "refused_format"),
    "heic": (b"\0\0\0\x18ftypheic" + bytes(40), "refused_format"),
    "psd": (b"8BPS" + bytes(40), "refused_format"),
    "exr": (b"\x76\x2f\x31\x01" + bytes(40), "refused_format"),
    "pnm": (b"P6\n8 8\n255\n" + bytes(192), "refused_format"),
    "one-byte": (b"\xff", "not_image"),
    "magic-only": (b"\xff\xd8\xff", "undecodable"),
    "jpeg-eoi": (b"\xff\xd8\xff\xd9", "undecodable"),
    "png-magic": (b"\x89PNG\r\n\x1a\n", "undecodable"),
    "gif-magic": (b"GIF89a", "undecodable"),
    "riff": (b"RIFF\xff\xff\xff\xffWEBPVP8 ", "undecodable"),
}
BOMBS = {
    "png-30000": (png(30_000, 30_000), "bomb"),
    "png-max": (png(2**31 - 1, 2**31 - 1), "bomb"),
    "png-over": (png(2**32 - 1, 1), "bomb"),
    "png-zero": (png(0, 40), "undecodable"),
    "png-real": (png(6_000, 6_000, rows=6_000), "bomb"),
    "png-apng": (png(64, 64, extra=[chunk(b"acTL", b"\0\x01\x86\xa0\0\0\0\0")]), "bomb"),
    "png-text": (png(64, 64, extra=[chunk(b"tEXt", b"a\0b")] * 9_000), "bomb"),
    "png-ztxt": (png(64, 64, extra=[chunk(b"zTXt", b"a\0\0" + bytes(200_000))] * 6), ("bomb", "too_large")),
    "png-long": (png(64, 64)[:60] + b"\xff\xff\xff\xf0IDAT", "undecodable"),
    "jpeg-65000": (jpeg_of(65_000, 65_000), "bomb"),
    "jpeg-zero": (jpeg_of(0, 32), "undecodable"),
    "jpeg-scans": (jpeg_of(48, 32, scans=1_000), "bomb"),
    "jpeg-segments": (jpeg_of(48, 32, segments=5_000), "bomb"),
    "gif-65535": (gif(65_535, 65_535), "bomb"),
    "gif-frames": (gif(1_000, 1_000, n_frames=5_000), "bomb"),
    "gif-zero": (gif(0, 0), "undecodable"),
    "webp-16383": (webp(16_383, 16_383), "bomb"),
    "webp-huge": (webp(1 << 24, 1 << 24), "bomb"),
    "webp-frames": (webp(1_000, 1_000, n_frames=5_000), "bomb"),
    "webp-chunks": (webp(64, 64, n_other=5_000), "bomb"),
}
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


def served(routes, kind, found):
    """Put answers behind paths and give the cases that ask for them."""
    cases = []
    for i, (name, (route, status)) in enumerate(found.items()):
        path = f"/{kind}/{i}-{name}"
        routes[path] = route
        cases.append((kind, GOOD + path, "c", status))
    return cases


def transfers():
    """Answers that are wrong in their lengths, codings or pace."""
    head, half = answer(OK, length=False), len(OK) // 2
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    one = b"%x\r\n%s\r\n" % (len(OK), OK)
    fold = b"HTTP/1.1 200 OK\r\nX-A: b\r\n c\r\nbroken line\r\nX: \0\r\nContent-Length: %d\r\n\r\n" % len(OK)
    yield (
        "slow",
        {
            "hang": (hang, "timeout"),
            "drip-head": (Drip(b"", b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100, 1, 0.2), "timeout"),
            "drip-head-lines": (Drip(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 20, 6, 0.2), "timeout"),
            "drip-body": (Drip(answer(OK)[: -len(OK)], OK, 8, 0.05), "timeout"),
            "byte-a-second": (Drip(answer(OK)[: -len(OK)], OK, 1, 0.9), "timeout"),
            "drip-chunks": (Drip(chunked, b"1\r\nx\r\n" * 40, 6, 0.2), "timeout"),
            "drip-interim": (Drip(b"", b"HTTP/1.1 100 Go\r\n\r\n" * 5, 18, 0.9), "timeout"),
            "half": (Drip(answer(OK)[:-half], b"x", 1, 9), "timeout"),
            "steady": (Drip(answer(OK)[: -len(OK)], OK, 200, 0.05), "ok"),
        },
    )
    yield (
        "endless",
        {
            "zeros": (Endless(head, b"\0"), "too_large"),
            "chunks": (Endless(chunked, b"400\r\n" + b"x" * 1024 + b"\r\n"), "too_large"),
            "tiny-chunks": (Endless(chunked, b"1\r\nx\r\n"), ("too_large", "timeout")),
            "trailers": (Endless(chunked + b"0\r\n", b"X: y\r\n"), "too_large"),
            "headers": (Endless(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"), "too_large"),
            "one-header": (Endless(b"HTTP/1.1 200 OK\r\nX: ", b"y"), "too_large"),
            "status-line": (Endless(b"HTTP/1.1 200 ", b"y"), "too_large"),
            "interim": (Endless(b"", b"HTTP/1.1 100 Go\r\n\r\n"), "connection"),
            "chunk-size": (Endless(chunked, b"0"), "connection"),
            "declared": (Endless(b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\n", b"\0"), "too_large"),
            "just-over": (LARGE, "too_large"),
            "many-headers": (answer(OK, [f"X-{i}: y" for i in range(300)]), "too_large"),
        },
    )
    yield (
        "length",
        {
            "longer": (answer(OK, [f"Content-Length: {len(OK) + 50}"], length=False), "connection"),
            "shorter": (answer(OK, ["Content-Length: 300"], length=False), "undecodable"),
            "negative": (answer(OK, ["Content-Length: -1"], length=False), "connection"),
            "nan": (answer(OK, ["Content-Length: NaN"], length=False), "connection"),
            "plus": (answer(OK, [f"Content-Length: +{len(OK)}"], length=False), "connection"),
            "two": (answer(OK, ["Content-Length: 5"]), "connection"),
            "twice-same": (answer(OK, [f"Content-Length: {len(OK)}"]), "ok"),
            "list": (answer(OK, ["Content-Length: 5, 6"], length=False), "connection"),
            "huge": (answer(OK, ["Content-Length: " + "9" * 400], length=False), "connection"),
            "empty-value": (answer(OK, ["Content-Length:"], length=False), "ok"),
            "zero": (answer(b""), "empty"),
            "none": (answer(b"", length=False), "empty"),
            "chunked": (chunked + one + b"0\r\n\r\n", "ok"),
            "chunked-and-length": (chunked[:-2] + b"Content-Length: 5\r\n\r\n" + one + b"0\r\n\r\n", "ok"),
            "chunk-no-size": (chunked + b"xyz\r\n", "connection"),
            "chunk-negative": (chunked + b"-5\r\nxxxxx\r\n", "connection"),
            "chunk-overflow": (chunked + b"ffffffffffffffff\r\nx", "connection"),
            "chunk-too-long": (chunked + b"2\r\nxxxxx\r\n0\r\n\r\n", "connection"),
            "chunk-cut": (chunked + one[:-20], "connection"),
            "chunk-no-end": (chunked + one, "connection"),
        },
    )
    yield (
        "coding",
        {
            "gzip": (answer(zipped(OK), ["Content-Encoding: gzip"]), "ok"),
            "x-gzip": (answer(zipped(OK), ["Content-Encoding: X-GZIP"]), "ok"),
            "deflate": (answer(zlib.compress(OK), ["Content-Encoding: deflate"]), "ok"),
            "raw-deflate": (answer(raw_deflate(OK), ["Content-Encoding: deflate"]), "ok"),
            "identity": (answer(OK, ["Content-Encoding: identity"]), "ok"),
            "gzip-bomb": (answer(zipped(OK + bytes(64 << 20)), ["Content-Encoding: gzip"]), "too_large"),
            "gzip-cut": (answer(zipped(OK)[:-30], ["Content-Encoding: gzip"]), "refused_encoding"),
            "gzip-lie": (answer(OK, ["Content-Encoding: gzip"]), "refused_encoding"),
            "twice": (answer(zipped(zipped(OK)), ["Content-Encoding: gzip, gzip"]), "refused_encoding"),
            "br": (answer(OK, ["Content-Encoding: br"]), "refused_encoding"),
            "zstd": (answer(OK, ["Content-Encoding: zstd"]), "refused_encoding"),
            "unknown": (answer(OK, ["Content-Encoding: \xff\xfe"]), "refused_encoding"),
            "transfer-gzip": (answer(OK, ["Transfer-Encoding: gzip"], length=False), "refused_encoding"),
        },
    )
    yield (
        "protocol",
        {
            "none": (b"", "connection"),
            "http09": (OK, "connection"),
            "garbage": (b"\x16\x03\x01\x02\x00\x01" * 50 + b"\r\n\r\n", "connection"),
            "version": (b"HTTP/2 200 OK\r\n\r\n" + OK, "connection"),
            "status-999": (answer(OK, status="999 No"), "connection"),
            "status-text": (answer(OK, status="OK"), "connection"),
            "no-reason": (answer(OK, status="200"), "ok"),
            "line-feeds": (answer(OK)[: -len(OK)].replace(b"\r\n", b"\n") + OK, "ok"),
            "folds": (fold + OK, "ok"),
            "interim": (b"HTTP/1.1 103 Hint\r\nLink: x\r\n\r\n" + answer(OK), "ok"),
            "upgrade": (answer(status="101 Go"), "connection"),
            "reset": (reset, "connection"),
            **{f"{n}": (answer(b"x" * 50, status=f"{n} X"), status) for n, status in STATUS_CODES.items()},
        },
    )


STATUS_CODES = {
    **{
        203: "not_image",
        204: "empty",
        300: "http_3xx",
        304: "http_3xx",
        305: "http_3xx",
        400: "http_4xx",
        401: "http_4xx",
    },
    **{
        402: "http_4xx",
        403: "http_4xx",
        404: "http_404",
        410: "http_4xx",
        418: "http_4xx",
        451: "http_4xx",
        500: "http_5xx",
    },
    **{502: "http_5xx", 504: "http_5xx", 599: "http_5xx"},
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


MUTATED = ("ok", "undecodable", "not_image", "bomb", "refused_format", "decoder_died")
HASHES = [(kind(OK).hexdigest(), "ok") for kind in (hashlib.md5, hashlib.sha1, hashlib.sha256)]
HASHES += [(kind(b"other").hexdigest(), "hash_mismatch") for kind in (hashlib.md5, hashlib.sha1, hashlib.sha256)]
HASHES += [("not-a-hash", "bad_hash"), ("f" * 63, "bad_hash"), ("", "ok")]
