"""What hostile servers answer, with the only status (or a tuple of them) that a request may end with."""

import hashlib
import zlib

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
    png,
    raw_deflate,
    reset,
    webp,
    zipped,
)

OK = encoded()
LARGE = answer(OK + PAD * 20)  # 1.3 MB
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
MUTATED = ("ok", "undecodable", "not_image", "bomb", "refused_format", "decoder_died")
HASHES = [(kind(OK).hexdigest(), "ok") for kind in (hashlib.md5, hashlib.sha1, hashlib.sha256)]
HASHES += [(kind(b"other").hexdigest(), "hash_mismatch") for kind in (hashlib.md5, hashlib.sha1, hashlib.sha256)]
HASHES += [("not-a-hash", "bad_hash"), ("f" * 63, "bad_hash"), ("", "ok")]
