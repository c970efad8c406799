"""The one process that decodes, so that a picture which kills OpenCV kills nothing else.

In, by stdin: frames `length, max_side_px, kind` and the encoded picture. Out, by stdout: frames `ok, width, height,
original width, original height, length` and a JPEG of quality 95, or the reason as text.
Invariants: memory is capped by the kernel; EXIF orientation is applied, as the stored JPEG has no tag for it; alpha is
laid on white; 16 bits become 8 by scale; a picture is decoded whole. Decoding at half size would cost a fifth less and
lose fine stripes, which a full decode shows as an alias: down to 20 dB, and nothing in the half tells.
Cost: a decode, an area resize where the long side is over max_side_px, an encode. Of 4,000 x 3,000: 29, 18 and 2 ms;
with fresh memory for each picture the decode took 55 (see MEMORY), and OpenCV's own resize takes 43.
"""

from __future__ import annotations

import resource
import struct
import sys
from typing import Any

ASK, ANSWER = struct.Struct("<IIB"), struct.Struct("<BIIIII")
MEMORY_BYTES = 4 << 30  # 100 M pixels in four channels, and the same resized, take under 1 GiB
MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(128 << 20)}  # pages wait for the next picture
QUALITY = 95
STRIP_ROWS = 256  # alpha is laid on white in float64, a strip at a time
BAND_ROWS = 16  # of the resized picture at once, so that they stay in the cache
PARTS = 256  # of a pixel: sums of such parts are exact in float32, so no processor rounds them its own way
KINDS = ("jpeg", "png", "webp", "gif", "other")


def picture(data: bytes, max_side_px: int, kind: str) -> tuple[bytes, int, int, int, int]:
    """A JPEG within max_side_px, its size, and the size it had."""
    import cv2
    import numpy as np

    flags = cv2.IMREAD_ANYCOLOR if kind == "jpeg" else cv2.IMREAD_UNCHANGED
    image: Any = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if image is None:
        raise ValueError("the image does not decode")
    if image.dtype != np.uint8:
        image = (image / (257 if image.dtype == np.uint16 else 1)).clip(0, 255).round().astype(np.uint8)
    if image.ndim == 3 and image.shape[2] == 4:
        image = _on_white(image)
    height, width = image.shape[:2]
    if max(height, width) > max_side_px:
        scale = max_side_px / max(height, width)
        image = area(image, max(round(width * scale), 1), max(round(height * scale), 1))
    stored = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()
    return stored, image.shape[1], image.shape[0], width, height


def area(image: Any, width: int, height: int) -> Any:  # noqa: ANN401 - arrays of a package that only this process has
    """A smaller picture whose pixels are the means of what they cover, fractions of pixels counted.

    OpenCV does this fast where each covers as many whole pixels; else row by row here, and it does the columns.
    """
    import cv2
    import numpy as np

    n_rows, n_columns = image.shape[:2]
    if n_rows % height == 0 and n_columns % width == 0:
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    flat = image.reshape(n_rows, -1)
    at = np.rint(np.arange(height + 1) * (n_rows / height) * PARTS).astype(int)
    first, part = at // PARTS, at % PARTS / PARTS  # a row of the result begins `part` of a row below row `first`
    small = np.empty((height, width, *image.shape[2:]), np.uint8)
    for top in range(0, height, BAND_ROWS):
        band = np.empty((min(BAND_ROWS, height - top), flat.shape[1]), np.float32)
        for i in range(len(band)):
            (begin, end), out = first[top + i : top + i + 2], band[i : i + 1]
            last, parts = min(end, n_rows - 1), part[top + i : top + i + 2]
            above, below = flat[begin : begin + 1], flat[last : last + 1]
            cv2.addWeighted(above, 1 - parts[0], below, parts[1], 0, out, dtype=cv2.CV_32F)
            for whole in range(begin + 1, end):
                cv2.accumulate(flat[whole : whole + 1], out)
        band = band.reshape(len(band), n_columns, *image.shape[2:])
        columns = cv2.resize(band, (width, len(band)), interpolation=cv2.INTER_AREA)
        small[top : top + len(band)] = cv2.convertScaleAbs(columns, alpha=height / n_rows).reshape(columns.shape)
    return small


def _on_white(image: Any) -> Any:  # noqa: ANN401
    import numpy as np

    out = np.empty((*image.shape[:2], 3), np.uint8)
    for top in range(0, len(image), STRIP_ROWS):
        strip = image[top : top + STRIP_ROWS]
        alpha = strip[:, :, 3, np.newaxis]
        mixed = alpha / 255 * strip[..., :3] + 255 - alpha
        out[top : top + STRIP_ROWS] = np.rint(mixed.clip(min=0, max=255)).astype(np.uint8)
    return out


def main() -> None:
    """Serve until the other end closes."""
    import cv2

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    cv2.setNumThreads(1)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while head := source.read(ASK.size):
        length, max_side_px, kind = ASK.unpack(head)
        data = source.read(length)
        try:
            stored, *sizes = picture(data, max_side_px, KINDS[kind])
            answer = ANSWER.pack(1, *sizes, len(stored)) + stored
        except Exception as error:  # OpenCV raises its own type for what it refuses; a MemoryError is the cap
            memory = isinstance(error, MemoryError) or "OutOfMemory" in str(error)
            why = b"decoding takes more memory than allowed" if memory else b"the image does not decode"
            answer = ANSWER.pack(0, 0, 0, 0, 0, len(why)) + why
        sink.write(answer)
        sink.flush()


if __name__ == "__main__":
    main()
