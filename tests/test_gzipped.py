"""Gzipped tars: read as they are published, with the bytes that the plain tar gives; cut short, they say where."""

import gzip
import io
import json
import random
import resource
import tarfile
from itertools import pairwise
from pathlib import Path

import pytest
import source_layouts as write

from solo.acquire.gzipped import Damaged, Gzipped
from solo.acquire.image_files import Pictures
from solo.adapters import conversations_jsonl, webdataset_captions
from solo.sample import Rejected

MEMBERS = [(f"{n:03}.jpg", random.Random(n).randbytes(40_000 + n) + bytes(30_000)) for n in range(30)]


def packed(data: bytes, n_members: int) -> bytes:
    """A gzip file of so many members, as pigz and `cat a.gz b.gz` make them, and zeros as a tape pads."""
    cuts = [len(data) * i // n_members for i in range(n_members + 1)]
    return b"".join(gzip.compress(data[a:b], 1) for a, b in pairwise(cuts)) + bytes(100)


@pytest.mark.parametrize("n_members", [1, 4])
@pytest.mark.parametrize("every_bytes", [0, 100_000])
def test_any_bytes_from_any_place(tmp_path: Path, n_members: int, every_bytes: int) -> None:
    data = b"".join(body for _, body in MEMBERS)
    (tmp_path / "a.gz").write_bytes(packed(data, n_members))
    draw = random.Random(1)
    with Gzipped(tmp_path / "a.gz", every_bytes=every_bytes) as file:
        for _ in range(60):
            place, n = draw.randrange(len(data) + 10), draw.choice([0, 1, 512, 300_000])
            file.seek(place)
            assert file.read(n) == data[place : place + n] and file.tell() == min(place + n, max(place, len(data)))


@pytest.mark.parametrize("place", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("harm", ["cut", "flip"])
def test_what_is_cut_or_damaged_is_told_and_never_given(tmp_path: Path, place: float, harm: str) -> None:
    data = b"".join(body for _, body in MEMBERS)
    raw = bytearray(gzip.compress(data, 1))
    at = int(place * len(raw)) + (20 if harm == "flip" else 0)
    if harm == "cut":
        del raw[at:]
    else:
        raw[at] ^= 0x10
    (tmp_path / "a.gz").write_bytes(raw)
    found = b""
    says = rf"(cut short after {at:,} bytes|damaged before its byte )"
    with pytest.raises(Damaged, match=says), Gzipped(tmp_path / "a.gz") as file:
        while True:
            found += file.read(10_000)
    assert harm == "flip" or data.startswith(found)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz"])
def test_pictures_by_name_are_those_of_the_plain_tar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("solo.acquire.image_files.EVERY_BYTES", 200_000)
    write.tar(tmp_path / name, MEMBERS)
    pictures = Pictures(tmp_path, name)
    for member, data in random.Random(2).sample(MEMBERS, len(MEMBERS)):
        assert pictures.read(member, "i") == data
    assert isinstance(pictures.read("none.jpg", "i"), Rejected)
    whole = (tmp_path / name).read_bytes()
    for n in (len(whole) // 2, len(whole) - 4):  # the second lacks no picture, but nobody knows
        (tmp_path / name).write_bytes(whole[:n])
        with pytest.raises(ValueError, match=rf"{name}: cut short after {n:,} bytes, which unpack to .*; fetch it ag"):
            Pictures(tmp_path, name)


def test_a_gzip_file_of_something_else_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(b"no tar" * 1000))
    with pytest.raises(ValueError, match=r"a\.tar\.gz: .*; give a tar, gzipped or not, a zip or a folder"):
        Pictures(tmp_path, "a.tar.gz")


def test_webdataset_records_are_those_of_the_plain_tar(tmp_path: Path) -> None:
    pairs = [(f"{n}.{s}", d) for n in range(9) for s, d in (("jpg", write.picture(n, "JPEG")), ("txt", b"said"))]
    pairs += [("9.jpg", bytes(1 << 20)), ("9.txt", b"")]
    for suffix in ("tar", "tar.gz"):
        write.tar(tmp_path / suffix / f"0.{suffix}", pairs)
    plain, found = (
        list(webdataset_captions.read(tmp_path / s, source="s", shards=f"*.{s}")) for s in ("tar", "tar.gz")
    )
    assert [(i.key, i.images) for i in found[:9]] == [(i.key, i.images) for i in plain[:9]]
    assert [type(i) for i in found] == [type(i) for i in plain]
    path = tmp_path / "tar.gz/0.tar.gz"
    path.write_bytes(path.read_bytes()[: -(1 << 8)])
    *good, last = webdataset_captions.read(tmp_path / "tar.gz", source="s", shards="*.tar.gz")
    assert [i.key for i in good[:9]] == [i.key for i in plain[:9]] and isinstance(last, Rejected)
    assert last.identity.startswith("0.tar.gz after ") and "damaged from here on: cut short after " in str(last.error)


def test_what_unpacks_to_much_fills_no_memory(tmp_path: Path) -> None:
    talk = {"id": "bomb", "image": "bomb.jpg", "conversations": ["<image>\nWhat?", "This."]}
    (tmp_path / "all_data.jsonl").write_text(json.dumps(talk))
    write.tar(tmp_path / "rest.tar", [("good.jpg", b"good")])
    body = io.BytesIO()
    with gzip.open(body, "wb", 1) as out:  # of a member of 300 MB, over what one may have
        out.write(header(300 << 20))
        for _ in range(300):
            out.write(bytes(1 << 20))
        out.write((tmp_path / "rest.tar").read_bytes())
    (tmp_path / "images.tar.gz").write_bytes(body.getvalue())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (item,) = conversations_jsonl.read(tmp_path, source="s", images="images.tar.gz")
    assert isinstance(item, Rejected) and item.status == "bad_record"
    assert Pictures(tmp_path, "images.tar.gz").read("good.jpg", "i") == b"good"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + (50 << 10)


def header(size: int) -> bytes:
    info = tarfile.TarInfo("bomb.jpg")
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)
