"""The one process that decodes, so that a picture which kills OpenCV kills nothing else.

In, by stdin: frames `length, max_side_px, kind, width, height, channels` and the encoded picture. Out, by stdout:
frames `ok, width, height, original width, original height, length` and a JPEG of quality 95, or the reason as text.
Invariants: memory is capped by the kernel; EXIF orientation is applied, as the stored JPEG has no tag for it; alpha is
laid on white; 16 bits become 8 by scale. Cost: a decode, an area resize where the long side is over max_side_px, an
encode. A JPEG that shrinks 3.8 times or more is decoded at half its size (7.6: at a quarter), twice as fast, unless
a tile of the half has more fine structure than MAX_DETAIL. Photographs, noise and text that pass are >= 42 dB from a
full decode, as are 166 of 169 gratings; weak stripes of 2.2 to 2.6 px pass unseen at 35 to 40 dB, where a full decode
shows an alias of them and the half shows grey.
"""

from __future__ import annotations

import resource
import struct
import sys
from typing import Any

ASK, ANSWER = struct.Struct("<IIBIIB"), struct.Struct("<BIIIII")
MEMORY_BYTES = 4 << 30  # 100 M pixels in four channels, and the same resized, take under 1 GiB
QUALITY = 95
STRIP_ROWS = 256  # alpha is laid on white in float64, a strip at a time
MAX_BITS = 1.5  # per pixel; above, a picture rarely passes, and the try would cost a third
REST = 1.9  # what a reduced decode leaves to the area resize
MAX_DETAIL = 150.0  # mean square of the second difference between neighbours, in the busiest tile
TILE = (2, 64)  # of every 32nd line: 64 x 64 pixels, so that a flat sky does not hide a grating
KINDS = ("jpeg", "png", "webp", "gif", "other")


def picture(data: bytes, max_side_px: int, kind: str, seen: tuple[int, int, int]) -> tuple[bytes, int, int, int, int]:
    """A JPEG within max_side_px, its size, and the size it had; `seen` are width, height and channels of its header."""
    import cv2
    import numpy as np

    encoded = np.frombuffer(data, np.uint8)
    image: Any = _reduced(encoded, max_side_px, seen) if kind == "jpeg" else None
    if image is None:
        image = cv2.imdecode(encoded, cv2.IMREAD_ANYCOLOR if kind == "jpeg" else cv2.IMREAD_UNCHANGED)
        if image is None:
            raise ValueError("the image does not decode")
        seen = (image.shape[1], image.shape[0], 0)
    if image.dtype != np.uint8:
        image = (image / (257 if image.dtype == np.uint16 else 1)).clip(0, 255).round().astype(np.uint8)
    if image.ndim == 3 and image.shape[2] == 4:
        image = _on_white(image)
    width, height, _ = seen
    if max(height, width) > max_side_px:
        image = _resized(image, width, height, max_side_px)
    stored = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()
    return stored, image.shape[1], image.shape[0], width, height


def _resized(image: Any, width: int, height: int, max_side_px: int) -> Any:  # noqa: ANN401
    """The picture of this size, or what a reduced decode left of it, with its long side at max_side_px."""
    import cv2

    scale = max_side_px / max(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    if (image.shape[1] > image.shape[0]) != (width > height):  # a reduced decode was turned by its EXIF tag
        size = size[::-1]
    if max(image.shape[:2]) < max(height, width):  # little detail is left, so a line between neighbours will do:
        whole = round(max(image.shape[:2]) / max_side_px)  # to a whole multiple, which OpenCV averages twice as fast
        image = cv2.resize(image, (size[0] * whole, size[1] * whole), interpolation=cv2.INTER_LINEAR)
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _reduced(encoded: Any, max_side_px: int, seen: tuple[int, int, int]) -> Any:  # noqa: ANN401
    """The picture at a fraction of its size where that loses nothing that the area resize would keep, else None."""
    import cv2

    width, height, n_channels = seen
    colour = {
        1: {2: cv2.IMREAD_REDUCED_GRAYSCALE_2, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4, 8: cv2.IMREAD_REDUCED_GRAYSCALE_8},
        3: {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8},
    }.get(n_channels, {})
    if 8 * len(encoded) > MAX_BITS * width * height:
        return None
    for factor in (8, 4, 2):
        if factor in colour and max(width, height) >= max_side_px * factor * REST:
            image = cv2.imdecode(encoded, colour[factor])
            return None if image is None or _detail(image) > MAX_DETAIL else image
    return None


def _detail(image: Any) -> float:  # noqa: ANN401
    """The largest mean square of second differences in any tile, along every 32nd row and every 32nd column."""
    import numpy as np

    worst, step = 0.0, image.shape[2] if image.ndim == 3 else 1  # neighbours of one channel are `step` apart
    for lines in (image[::32], image[:, ::32].swapaxes(0, 1)):
        flat = lines.reshape(len(lines), -1).astype(np.int16)
        bend = (flat[:, 2 * step :] - 2 * flat[:, step:-step] + flat[:, : -2 * step]).astype(np.float32)
        worst = max(worst, float(_tile_means(bend * bend, (TILE[0], TILE[1] * step)).max()))
    return worst


def _tile_means(squares: Any, tile: tuple[int, int]) -> Any:  # noqa: ANN401
    """Means over tiles; what is left over at the right and below belongs to the last tiles."""
    import numpy as np

    at = [np.arange(max(n // size, 1)) * size for n, size in zip(squares.shape, tile, strict=True)]
    sums = np.add.reduceat(np.add.reduceat(squares, at[0], axis=0), at[1], axis=1)
    sizes = [np.diff([*start, n]) for start, n in zip(at, squares.shape, strict=True)]
    return sums / np.outer(*sizes)


def _on_white(image: Any) -> Any:  # noqa: ANN401 - arrays of a package that only this process has
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
        length, max_side_px, kind, *seen = ASK.unpack(head)
        data = source.read(length)
        try:
            stored, *sizes = picture(data, max_side_px, KINDS[kind], tuple(seen))
            answer = ANSWER.pack(1, *sizes, len(stored)) + stored
        except Exception as error:  # OpenCV raises its own type for what it refuses; a MemoryError is the cap
            memory = isinstance(error, MemoryError) or "OutOfMemory" in str(error)
            why = b"decoding takes more memory than allowed" if memory else b"the image does not decode"
            answer = ANSWER.pack(0, 0, 0, 0, 0, len(why)) + why
        sink.write(answer)
        sink.flush()


if __name__ == "__main__":
    main()
