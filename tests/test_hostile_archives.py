"""Archives are read in place: no name in one is ever a path, and none fills the disk or the memory."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from solo.acquire import tables, upstream
from solo.adapters import conversations_jsonl, jsonl_text, llava, table_pairs, webdataset_captions, webdataset_labels
from solo.sample import Rejected

SECRET = b"what lies outside"
NAMES = ("../out.png", "../../out.png", "/out.png", "a/../../out.png", "..\\out.png", "good.png")
LINKS = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)


def picture(shade=0):
    out = io.BytesIO()
    Image.new("RGB", (8, 6), (shade, 0, 0)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder below another, with a file beside it that nothing may reach; nothing new lies anywhere in the end."""
    here = tmp_path / "base" / "copy"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    for path in (tmp_path / "out.png", tmp_path / "base/out.png", tmp_path / "base/secret"):
        path.write_bytes(SECRET)
    yield here
    beside = {p.relative_to(tmp_path).as_posix(): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    outside = {name: data for name, data in beside.items() if not name.startswith("base/copy/")}
    assert outside == dict.fromkeys(("out.png", "base/out.png", "base/secret"), SECRET)
    assert not (Path("/out.png")).exists()


def tar(path, members):
    """Members as (name, bytes), or (name, type, target) of a link or device."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as out:
        for name, *what in members:
            info = tarfile.TarInfo(name)
            if len(what) == 2:
                info.type, info.linkname = what
                out.addfile(info)
            else:
                info.size = len(what[0])
                out.addfile(info, io.BytesIO(what[0]))


def sparse(name, real_bytes):
    """A tar of one member that is 512 bytes of data at the end of a hole."""
    info = tarfile.TarInfo(name)
    info.size = 512
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[156:157] = b"S"
    number = b"\x80" + struct.pack(">Q", real_bytes - 512).rjust(11, b"\0")
    header[386:398], header[398:410] = number, b"%011o\0" % 512
    header[483:495] = b"\x80" + struct.pack(">Q", real_bytes).rjust(11, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    return bytes(header) + b"x" * 512 + b"\0" * 1024


def records(folder, names):
    """LLaVA records that ask for these pictures."""
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    (folder / "chat.json").write_text(json.dumps([{"id": n, "image": n, "conversations": said} for n in names]))


def ends(items):
    """Identity -> status, ok where it is a sample; no sample holds what lies outside."""
    found = {}
    for item in items:
        if isinstance(item, Rejected):
            found[item.identity] = item.status
        else:
            assert SECRET not in item.images
            found[item.meta["id"]] = "ok"
    return found


def pictures_tar(folder):
    tar(folder / "images.tar", [*((name, picture(i)) for i, name in enumerate(NAMES)), *links()])
    return "images.tar"


def links():
    return [(f"link-{kind[0]}.png", kind, "../secret") for kind in LINKS]


def pictures_zip(folder):
    with zipfile.ZipFile(folder / "images.zip", "w") as out:
        for i, name in enumerate(NAMES):
            out.writestr(name, picture(i))
        link = zipfile.ZipInfo("link-50.png")
        link.external_attr = 0o120777 << 16
        out.writestr(link, "../secret")
    return "images.zip"


def pictures_folder(folder):
    (folder / "images").mkdir()
    (folder / "images/good.png").write_bytes(picture(5))
    (folder / "images/link-50.png").symlink_to(folder.parent / "secret")
    (folder / "images/deep").symlink_to(folder.parent)
    return "images"


@pytest.mark.parametrize("made", [pictures_tar, pictures_zip, pictures_folder])
def test_a_pictures_name_is_a_name_and_no_path(folder, made):
    where = made(folder)
    asked = [*NAMES, "link-50.png", "link-49.png", "deep/secret", "/etc/passwd", "./good.png", "../secret"]
    records(folder, asked)
    found = ends(llava.read(folder, source="s", images=where))
    assert found["good.png"] == "ok" and set(found) == set(asked)
    refused = {name for name, status in found.items() if status == "missing_image"}
    assert {"deep/secret", "/etc/passwd", "../secret", "link-49.png"} <= refused
    if made is pictures_folder:
        assert refused == set(asked) - {"good.png", "./good.png"}
    else:  # in an archive such a name is as good as another: what it names is in the archive
        by_id = {
            item.meta["id"]: item
            for item in llava.read(folder, source="s", images=where)
            if item.__class__ is not Rejected
        }
        assert by_id["../out.png"].images == (picture(0),) and by_id["/out.png"].images == (picture(2),)


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_of_two_members_with_one_name_the_last_counts(folder, kind):
    members = [("a.png", picture(1)), ("b.png", picture(2)), ("a.png", picture(3))]
    if kind == "tar":
        tar(folder / "images.tar", members)
    else:
        with zipfile.ZipFile(folder / "images.zip", "w") as out, pytest.warns(UserWarning, match="Duplicate name"):
            for name, data in members:
                out.writestr(name, data)
    records(folder, ["a.png", "b.png"])
    a, b = llava.read(folder, source="s", images=f"images.{kind}")
    assert (a.images, b.images) == ((picture(3),), (picture(2),))


def test_webdataset_members_are_data_whatever_their_names(folder):
    pairs = [
        (f"{name.removesuffix('.png')}.{s}", d) for name in NAMES for s, d in (("png", picture()), ("txt", b"said"))
    ]
    tar(
        folder / "0.tar",
        [
            *pairs,
            *links(),
            ("link-50.txt", b"said"),
            ("twice.png", picture(1)),
            ("twice.png", picture(2)),
            ("twice.txt", b"a"),
        ],
    )
    items = list(webdataset_captions.read(folder, source="s"))
    found = ends(items)
    assert [s for name, s in found.items() if "link" not in name] == ["ok"] * len(NAMES)  # but for the hidden one
    assert all(found[name] != "ok" for name in found if "link" in name)
    assert next(i for i in items if "twice" in getattr(i, "meta", {"id": ""})["id"]).images == (picture(2),)
    (folder / "mapping.txt").write_text("n01 cup\n")
    tar(folder / "0.tar", [("../n01_1.png", picture()), ("n01_2.png", tarfile.SYMTYPE, "../secret")])
    assert ends(webdataset_labels.read(folder, source="s")) == {"../n01_1": "ok", "n01_2": "missing_image"}


def test_a_tar_that_is_mostly_holes_fills_no_memory(folder):
    bomb = sparse("bomb.png", 1 << 40)
    with tarfile.open(fileobj=io.BytesIO(bomb)) as made:
        assert made.next().size == 1 << 40  # or it would be none
    tar(folder / "rest", [("bomb.txt", b"said"), ("good.png", picture()), ("good.txt", b"said")])
    (folder / "0.tar").write_bytes(bomb[:1024] + (folder / "rest").read_bytes())
    assert ends(webdataset_captions.read(folder, source="s")) == {"0.tar/bomb": "bad_record", "0.tar/good": "ok"}
    (folder / "0.tar").rename(folder / "images.tar")
    records(folder, ["bomb.png", "good.png"])
    assert ends(llava.read(folder, source="s", images="images.tar")) == {"bomb.png": "bad_record", "good.png": "ok"}


def test_a_zip_that_unpacks_to_much_fills_no_memory(folder, monkeypatch):
    from solo.acquire import image_files

    monkeypatch.setattr(image_files, "MEMBER_BYTES", 1 << 20)
    with zipfile.ZipFile(folder / "images.zip", "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("bomb.png", b"\0" * (64 << 20))
        out.writestr("liar.png", b"\0" * (64 << 20))
        out.writestr("good.png", picture())
    raw = bytearray((folder / "images.zip").read_bytes())
    sizes = struct.pack("<I", 64 << 20)
    place = raw.rindex(b"liar.png") - 46 + 24  # its size in the central directory
    assert raw[place : place + 4] == sizes
    raw[place : place + 4] = struct.pack("<I", 1000)
    (folder / "images.zip").write_bytes(raw)
    records(folder, ["bomb.png", "liar.png", "good.png"])
    assert ends(llava.read(folder, source="s", images="images.zip")) == {
        "bomb.png": "bad_record",
        "liar.png": "bad_record",
        "good.png": "ok",
    }


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".lz4", ".bz2", ".zip"])
def test_a_line_that_unpacks_to_much_is_one_bad_record(folder, monkeypatch, suffix):
    monkeypatch.setattr(upstream, "ITEM_BYTES", 1 << 20)
    monkeypatch.setattr(upstream, "CHUNK_BYTES", 1 << 16)
    good = json.dumps({"text": "A document.", "meta": {"redpajama_set_name": "RedPajamaBook"}}).encode()
    edge = b'{"text": "' + b"x" * ((1 << 20) - 13) + b'"}\n'
    assert len(edge) == 1 << 20
    body = good + b"\n" + b'{"text": "' + b" " * (8 << 20) + b'"}\n' + edge + good[:-1] + b', "n": 2}'
    path = folder / f"a.jsonl{suffix}"
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
            out.writestr("../../a.jsonl", body)
    else:
        kind = {".gz": "gzip", ".zst": "zstd", ".lz4": "lz4", ".bz2": "bz2"}.get(suffix)
        with pa.CompressedOutputStream(str(path), kind) if kind else path.open("wb") as out:
            out.write(body)
    found = ends(jsonl_text.read(folder, source="s", files=["a.jsonl*"]))
    name = path.name
    assert found == {f"{name}:1": "ok", f"{name}:2": "bad_record", f"{name}:3": "ok", f"{name}:4": "ok"}


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".lz4"])
def test_compressed_lines_in_several_frames_are_all_read(folder, suffix):
    """As pigz, pzstd and `cat a.gz b.gz` make them."""
    whole = b""
    for i in range(3):
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, {".gz": "gzip", ".zst": "zstd", ".lz4": "lz4"}[suffix]) as out:
            out.write(json.dumps({"text": f"Document {i}."}).encode() + b"\n")
        whole += sink.getvalue().to_pybytes()
    (folder / f"a.jsonl{suffix}").write_bytes(whole)
    assert list(ends(jsonl_text.read(folder, source="s", files=["*"])).values()) == ["ok"] * 3


def test_a_cell_that_every_row_repeats_fills_no_memory(folder, monkeypatch):
    """A dictionary-coded column: 1,000 rows of one picture of 4 MB are a file of 4 MB, and would be 4 GB at once."""
    monkeypatch.setattr(tables, "BATCH_CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(tables, "MEMBER_BYTES", 3 << 20)
    image = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    texts = pa.list_(pa.struct([("user", pa.string()), ("assistant", pa.string())]))
    cell = [{"bytes": bytes(4 << 20), "path": "../../out.png"}]
    rows = [{"images": cell, "texts": [{"user": "What?", "assistant": "This."}]}] * 60
    good = {"images": [{"bytes": picture(), "path": "/etc/passwd"}], "texts": rows[0]["texts"]}
    schema = pa.schema([("images", image), ("texts", texts)])
    path = folder / "a.parquet"
    with pq.ParquetWriter(path, schema, compression="zstd", dictionary_pagesize_limit=1 << 30) as out:
        out.write_table(pa.Table.from_pylist(rows, schema))
        out.write_table(pa.Table.from_pylist([good], schema))
    assert path.stat().st_size < 1 << 20
    pool = pa.default_memory_pool()
    before, most = pool.bytes_allocated(), 0
    found = {}
    for item in table_pairs.read(folder, source="s"):
        found |= ends([item])
        most = max(most, pool.bytes_allocated() - before)
    assert list(found.values()) == ["bad_record"] * 60 + ["ok"]
    assert most < 100 << 20  # of the 240 MB that a batch of all would be


def test_json_lines_name_pictures_and_reach_nothing(folder):
    (folder / "images").mkdir()
    talk = [{"value": "What?"}, {"value": "This."}]
    lines = [{"id": n, "image": n, "conversations": talk} for n in (*NAMES, "../secret", "/etc/passwd", "images/../..")]
    (folder / "all_data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = ends(conversations_jsonl.read(folder, source="s", images="images"))
    assert set(found.values()) == {"missing_image"} and len(found) == len(lines)
