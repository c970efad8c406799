"""A hostile origin on real sockets, and the pictures it serves: what the open web does to a downloader, on purpose."""

import contextlib
import gzip
import io
import random
import socket
import socketserver
import struct
import threading
import time
import zlib
from collections import Counter

from PIL import Image

PAD = b"\0" * 65_536


def encoded(form="JPEG", size=(48, 32), seed=0, **save):
    noise = Image.frombytes("RGB", (8, 8), random.Random(seed).randbytes(192))
    out = io.BytesIO()
    noise.resize(size).save(out, form, **save)
    return out.getvalue()


def chunk(kind, data=b""):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *, extra=(), rows=None):
    """A 1-bit grey PNG; without `rows` its pixels are absent, which costs nothing and still declares them."""
    pixels = zlib.compress(b"".join(b"\0" + bytes((width + 7) // 8) for _ in range(rows or 1)), 9)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", pixels) + chunk(b"IEND")


def gif(width, height, n_frames=1):
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    palette = b"\0\0\0\xff\xff\xff"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + palette + frame * n_frames + b"\x3b"


def webp(width, height, n_frames=0, n_other=0):
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + size
    body += (b"ANMF" + struct.pack("<I", 16) + bytes(16)) * n_frames + (b"XMP " + struct.pack("<I", 0)) * n_other
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_of(width, height, *, segments=0, scans=0):
    """A real JPEG whose header is changed, and bare segments or scans put in."""
    data = bytearray(encoded())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    head = data[:2] + b"\xff\xfe\x00\x03x" * segments + data[2:-2]
    return bytes(head + b"\xff\xda\x00\x02" * scans + b"\xff\xd9")


def mutated(data, seed):
    """The same bytes with a few of them changed, cut out or put in."""
    draw, out = random.Random(seed), bytearray(data)
    for _ in range(draw.randint(1, 12)):
        at = draw.randrange(len(out))
        if draw.random() < 0.6:
            out[at] = draw.randrange(256)
        elif draw.random() < 0.5:
            del out[at : at + draw.randint(1, 40)]
        else:
            out[at:at] = draw.randbytes(draw.randint(1, 40))
        out = out or bytearray(b"\0")
    return bytes(out)


def answer(body=b"", headers=(), status="200 OK", length=True):
    lines = [f"HTTP/1.1 {status}", *headers] + ([f"Content-Length: {len(body)}"] if length else [])
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


class Drip:
    """`head`, then `data` in pieces of n bytes with a pause after each."""

    def __init__(self, head, data, n, pause_s):
        self.head, self.data, self.n, self.pause_s = head, data, n, pause_s

    def __call__(self, send, stop):
        send(self.head)
        for at in range(0, len(self.data), self.n):
            send(self.data[at : at + self.n])
            if stop.wait(self.pause_s):
                return


class Endless:
    """`head`, then `piece` until the other side has enough or `n_bytes` have gone."""

    def __init__(self, head, piece, n_bytes=24 << 20):
        self.head, self.piece, self.n_bytes = head, piece, n_bytes

    def __call__(self, send, stop):
        send(self.head)
        block = self.piece * max(65_536 // len(self.piece), 1)
        for _ in range(self.n_bytes // len(block)):
            send(block)
            if stop.is_set():
                return


def hang(send, stop):
    stop.wait(20)


def reset(send, stop):
    send(answer(encoded())[:200])
    raise ConnectionResetError


class Server:
    """Serves `routes[path]` (bytes, or a function of send and stop) and `robots[host]`; counts bytes by path."""

    def __init__(self, routes, robots):
        self.routes, self.robots = routes, robots
        self.sent, self.asked, self.agents = Counter(), Counter(), set()
        self.stop = threading.Event()
        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), self._handler(), bind_and_activate=False)
        self._server.daemon_threads, self._server.block_on_close = True, False
        self._server.request_queue_size = 256
        self._server.server_bind()
        self._server.server_activate()
        self.port = self._server.server_address[1]

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self._server.shutdown()
        self._server.server_close()

    def _handler(origin):
        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                try:
                    origin._serve(self.request)
                except OSError:
                    self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        return Handler

    def _serve(self, sock):
        head = b""
        sock.settimeout(10)
        while b"\r\n\r\n" not in head:
            data = sock.recv(65_536)
            if not data:
                return
            head += data
        lines = head.decode("latin-1").split("\r\n")
        path = lines[0].split(" ")[1]
        fields = {name.lower(): value.strip() for name, _, value in (text.partition(":") for text in lines[1:])}
        host = fields.get("host", "").partition(":")[0]
        self.agents.add(fields.get("user-agent"))
        self.asked[host, path] += 1
        route = self.robots.get(host, answer(status="404 None")) if path == "/robots.txt" else self.routes.get(path)

        def send(data):
            sock.sendall(data)
            self.sent[path] += len(data)

        if callable(route):
            route(send, self.stop)
        else:
            send(route if route is not None else answer(status="404 None"))


class Canary:
    """A listener that nobody may reach, on both loopbacks where the machine has both."""

    def __init__(self):
        self.n_connections = 0
        first = socket.create_server(("127.0.0.1", 0))
        self.port = first.getsockname()[1]
        self._sockets = [first]
        with contextlib.suppress(OSError):
            self._sockets.append(socket.create_server(("::1", self.port), family=socket.AF_INET6))
        for one in self._sockets:
            threading.Thread(target=self._listen, args=(one,), daemon=True).start()

    def _listen(self, one):
        while True:
            try:
                accepted, _ = one.accept()
            except OSError:
                return
            self.n_connections += 1
            accepted.sendall(answer(encoded()))
            accepted.close()

    def close(self):
        for one in self._sockets:
            one.shutdown(socket.SHUT_RDWR)
            one.close()


def zipped(data):
    return gzip.compress(data, 9)


def raw_deflate(data):
    pack = zlib.compressobj(9, zlib.DEFLATED, -15)
    return pack.compress(data) + pack.flush()


def wait_until(condition, seconds=5):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()
