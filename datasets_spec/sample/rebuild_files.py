"""Writers whose bytes depend on their arguments alone: no clock, no user id, no iteration order."""

import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image


def draw(key: str, n: int) -> int:
    """Return a number below n that depends on the key alone."""
    return int(hashlib.md5(key.encode()).hexdigest()[:12], 16) % n


def by_hash(items: Iterable[str], salt: str) -> list[str]:
    """Shuffle by hash: the same order whatever the order of the input."""
    return sorted(items, key=lambda item: hashlib.md5(f"{salt}:{item}".encode()).hexdigest())


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write a tar whose bytes depend on names and contents alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_zip(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write a zip whose bytes depend on names and contents alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data)


def write_text(path: Path, text: str) -> None:
    """Write text, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def dump(record: object) -> str:
    """One JSON record on one line, characters kept as they are."""
    return json.dumps(record, ensure_ascii=False)


def encode(image: Image.Image, form: str = "jpg", quality: int = 85) -> bytes:
    """Encode a picture as jpg, png (full colour), png of 32 colours (`png8`) or webp."""
    out = io.BytesIO()
    if form == "jpg":
        image.save(out, "JPEG", quality=quality, optimize=True)
    elif form == "webp":
        image.save(out, "WEBP", quality=quality, method=4)
    else:
        (image.quantize(32, dither=Image.Dither.NONE) if form == "png8" else image).save(out, "PNG", optimize=True)
    return out.getvalue()
