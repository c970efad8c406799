"""Stand-in for img2dataset's resizer: as served where that is allowed, else through the decoding process.

In: a fetched picture that was probed. Out: img2dataset's tuple (bytes, width, height, original width and height,
error). Invariants: a JPEG of one or three channels within max_side_px keeps its bytes and is not decoded here (filter
decodes every sample anyway); a decoder that dies or takes too long costs this one picture, which is `undecodable` or
`decoder_died`, and a new decoder goes on; nothing is raised, as img2dataset would lose the sample.
"""

from __future__ import annotations

import fcntl
import os
import select
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from solo.isolated.decoder import ANSWER, ASK, KINDS, MEMORY
from solo.isolated.probe import Probe
from solo.isolated.rules import Failed

DECODE_S = 30.0
PIPE_BYTES = 1 << 20
DECODER = Path(__file__).with_name("decoder.py")
Resized = tuple[bytes | None, int | None, int | None, int | None, int | None, str | None]


class Decoder:
    """The decoding process of this worker, started when it is first needed and after each death."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def ask(self, data: bytes, max_side_px: int, seen: Probe) -> tuple[bytes, int, int, int, int]:
        """A JPEG within max_side_px with sizes, or Failed."""
        kind = KINDS.index(seen.format if seen.format in KINDS else "other")
        frame = ASK.pack(len(data), max_side_px, kind)
        with self._lock:
            try:
                return self._exchange(frame, data)
            except (OSError, TimeoutError, EOFError) as error:
                self._stop()
                slow = isinstance(error, TimeoutError)
                why = f"decoding took over {DECODE_S:g} s" if slow else "the decoder died of it"
                raise Failed("decoder_died", 200, why) from None

    def _exchange(self, frame: bytes, data: bytes) -> tuple[bytes, int, int, int, int]:
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", START, str(DECODER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env=os.environ | MEMORY,
            )
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # an administrator may allow less
                    fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)  # type: ignore[union-attr]
        assert process.stdin is not None and process.stdout is not None
        deadline = time.monotonic() + DECODE_S
        write_all(process.stdin, frame + data, deadline)
        ok, width, height, from_width, from_height, length = ANSWER.unpack(read(process.stdout, ANSWER.size, deadline))
        stored = read(process.stdout, length, deadline)
        if not ok:
            raise Failed("undecodable", 200, stored.decode())
        return stored, width, height, from_width, from_height

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


# Runs the file as its own main module, tied to the worker that started it.
START = """
import ctypes, runpy, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def write_all(pipe: Any, data: bytes, deadline: float) -> None:  # noqa: ANN401 - a raw pipe end
    """Write to a pipe whose reader may hang."""
    os.set_blocking(pipe.fileno(), False)
    view = memoryview(data)
    while view:
        if not select.select([], [pipe], [], max(deadline - time.monotonic(), 0))[1]:
            raise TimeoutError
        view = view[os.write(pipe.fileno(), view[:PIPE_BYTES]) :]


def read(pipe: BinaryIO | Any, n: int, deadline: float) -> bytes:  # noqa: ANN401 - a raw pipe end
    """Read n bytes from a pipe whose writer may die or hang."""
    got = bytearray()
    while len(got) < n:
        if not select.select([pipe], [], [], max(deadline - time.monotonic(), 0))[0]:
            raise TimeoutError
        data = os.read(pipe.fileno(), min(n - len(got), 1 << 20))
        if not data:
            raise EOFError
        got += data
    return bytes(got)


DECODE = Decoder()


class Resizer:
    """What img2dataset calls for each picture; takes and ignores the arguments of its own resizer."""

    def __init__(self, image_size: int, *_: object, **__: object) -> None:
        self.max_side_px = image_size

    def __call__(self, img_stream: Any, blurring_bbox_list: object = None) -> Resized:  # noqa: ANN401
        """The bytes to store, or the status that img2dataset keeps as its error message."""
        try:
            data, seen = img_stream.getvalue(), img_stream.seen
            return (*self._stored(data, seen), None)
        except Failed as failed:
            return None, None, None, None, None, str(failed)
        except Exception as error:  # an exception would cost img2dataset the sample without a word
            return None, None, None, None, None, f"solo:undecodable:200:resizing raised {type(error).__name__}"

    def _stored(self, data: bytes, seen: Probe) -> tuple[bytes, int, int, int, int]:
        fits = max(seen.width, seen.height) <= self.max_side_px
        if seen.format == "jpeg" and seen.n_channels in (1, 3) and fits:
            return data, seen.width, seen.height, seen.width, seen.height
        return DECODE.ask(data, self.max_side_px, seen)
