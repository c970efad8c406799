"""Copies that went wrong in the usual ways: what `check` and the adapters say of each, by file, field and remedy."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import source_layouts as write
from source_cases import CASES
from test_sources import SPECS, local
from typer.testing import CliRunner

from solo import sources
from solo.acquire.mistaken import cut_short, mistaken
from solo.adapters import llava, table_pairs
from solo.cli import app as cli
from solo.spec import SourceSpec

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 446123456\n"
PAGE = b"\n<!DOCTYPE html>\n<html><title>Sign in</title></html>"


def laid(name: str, base: Path) -> tuple[SourceSpec, Path]:
    """A source's fixture where its spec looks for it."""
    spec, location = local(name, base)
    CASES[name].write(location)
    return spec, location


def holds(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def linked(path: Path) -> None:
    path.unlink()
    path.symlink_to("../../blobs/0a1b")


def deeper(path: Path) -> None:
    folder = path.parent
    folder.rename(folder.with_name("clone"))
    folder.mkdir()
    folder.with_name("clone").rename(folder / "clone")


def renamed(old: str, new: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(path.read_text().replace(f'"{old}"', f'"{new}"'))


DAMAGES = [
    # source, one file of its copy, what was done to it, what is said: the file, the field, the remedy
    ("dvqa", "*.parquet", holds(POINTER), r"parquet: a Git LFS pointer to 446,123,456 bytes.*`git lfs pull`.*dvqa/tr"),
    ("dvqa", "*.parquet", holds(PAGE), r"parquet: a web page, not data: .*open its URL"),
    ("dvqa", "*.parquet", holds(b""), r"parquet: 0 bytes long"),
    ("dvqa", "*.parquet", half, r"parquet: cut short at [\d,]+ bytes: a parquet file ends in 'PAR1'"),
    ("dvqa", "*.parquet", linked, r"parquet: a link to '\.\./\.\./blobs/0a1b', which is not there; copy what links"),
    ("imagenet-21k", "mapping.txt", linked, r"mapping\.txt: a link to .*\(`cp -L`\)"),
    ("imagenet-21k", "*.tar", lambda p: p.with_name(p.name + ".aria2").touch(), r"0000\.tar: not all of it yet"),
    ("imagenet-21k", "*.tar", holds(POINTER), r"train-0000\.tar: a Git LFS pointer"),
    ("imagenet-21k", "*.tar", holds(b"Entry not found"), r"train-0000\.tar: no tar file, it begins with 'Entry not"),
    ("imagenet-21k", "*.tar", half, r"train-0000\.tar: cut short at .* a tar ends in two blocks of zeros"),
    ("imagenet-21k", "mapping.txt", Path.unlink, r"mapping\.txt: no such file; .* has \['imagenet_w21-train-0000"),
    ("imagenet-21k", "mapping.txt", deeper, r"mapping\.txt: no such file; it lies further down, at clone/mapping\.t"),
    ("llavar", "pretrain.zip", holds(PAGE), r"pretrain\.zip: a web page"),
    ("llavar", "pretrain.zip", half, r"pretrain\.zip: cut short at .* a zip ends in its list of members"),
    ("llavar", "pretrain.zip", Path.unlink, r"pretrain\.zip: no such file.*fetch chat_llavar\.json, pretrain\.zip"),
    ("llavar", "chat_llavar.json", half, r"chat_llavar\.json: cut short at .* it ends in"),
    ("llavar", "chat_llavar.json", deeper, r"chat_llavar\.json: no such file; it lies further down, at clone/chat_"),
    ("llavar", "chat_llavar.json", renamed("conversations", "turns"), r"llavar\.json, record 1: .*conversations"),
    (
        "llavar",
        "chat_llavar.json",
        renamed("image", "picture"),
        r"json, record 1: 1 <image> marks, but no image",
    ),
    (
        "llavar",
        "chat_llavar.json",
        renamed("from", "role"),
        r"record 1: conversations\[0\]\.from is absent; the turn has \['role', 'value'\]",
    ),
    (
        "llavar",
        "chat_llavar.json",
        renamed("value", "text"),
        r"record 1: conversations\[0\]\.value is absent",
    ),
    ("detailed-captions", "densecap.json", renamed("value", "text"), r"record 0: conversations\[0\]\.value is absent"),
    ("gqa", "*.json", renamed("image", "picture"), r"mix665k\.json\[0\]: its image is not below gqa/, and so"),
    ("vlm-sft", "all_data.jsonl", half, r"all_data\.jsonl: cut short at .* it ends in"),
    ("vlm-sft", "chunk_10.tar.gz", half, r"chunk_10\.tar\.gz: cut short after [\d,]+ bytes, .*; fetch it again"),
    ("vlm-sft", "chunk_10.tar.gz", holds(b"Not Found"), r"chunk_10\.tar\.gz: no gz file, it begins with 'Not Found'"),
    ("vlm-sft", "all_data.jsonl", holds(b""), r"no record is there; fetch all_data"),
    (
        "llavar",
        "chat_llavar.json",
        lambda path: path.write_text(path.read_text().replace("GCC", "CC3M")),
        r"record 1: image: CC3M_train_1\.jpg is in none .*pretrain\.zip begins with pretrain/GCC_train_1\.jpg; ",
    ),
    ("slimpajama-1", "*12.jsonl.zst", holds(POINTER), r"_12\.jsonl\.zst: a Git LFS pointer"),
    ("slimpajama-1", "*12.jsonl.zst", half, r"_12\.jsonl\.zst:1: the file is damaged from here on"),
    ("mmc4", "*.jsonl.zip", holds(b"AccessDenied"), r"\.jsonl\.zip: no zip file, it begins with 'AccessDenied'"),
    ("cc12m", "*.parquet", holds(POINTER), r"0000\.parquet: a Git LFS pointer.* at 715b9059b4d4"),
]


@pytest.mark.parametrize(("name", "file", "damage", "says"), DAMAGES, ids=range(len(DAMAGES)))
def test_check_names_the_damaged_file(
    name: str, file: str, damage: Callable[[Path], object], says: str, tmp_path: Path
) -> None:
    spec, location = laid(name, tmp_path)
    damage(next(location.rglob(file)))
    with pytest.raises(ValueError, match=f"^{name}: .*{says}") as error:
        sources.check(spec, tmp_path / "specs", tmp_path)
    assert "\n" not in str(error.value)


def test_acquire_refuses_what_is_no_data_before_it_reads_any(tmp_path: Path) -> None:
    write.cauldron("Q", "A")(tmp_path)
    (tmp_path / "train-00001.parquet").write_bytes(POINTER)
    with pytest.raises(ValueError, match=r"train-00001\.parquet: a Git LFS pointer"):
        next(iter(table_pairs.read(tmp_path, source="s")))
    linked(tmp_path / "train-00001.parquet")
    with pytest.raises(ValueError, match=r"train-00001\.parquet: a link to"):
        next(iter(table_pairs.read(tmp_path, source="s")))
    (tmp_path / "chat.json").write_text("[]")
    (tmp_path / "images.zip").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match=r"images\.zip: .*fetch it again"):
        next(iter(llava.read(tmp_path, source="s", records="chat.json", images="images.zip")))


def test_a_copy_anywhere_is_probed_and_what_is_not_there_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOLO_SPECS", str(SPECS))
    monkeypatch.setenv("SOLO_ROOT", str(tmp_path))
    CASES["dvqa"].write(tmp_path / "mine")
    (file,) = (tmp_path / "mine").glob("*.parquet")
    file.rename(file.with_name("train-00000-of-00003-0a.parquet"))
    command = ["check", "dvqa", "--at", str(tmp_path / "mine")]
    shown = CliRunner().invoke(cli.app, command).stdout
    assert "2 of the first 5 records are as expected" in shown
    assert "train-*-of-00003: 2 files are not there, the first is train-00001-of-00003" in shown
    told = json.loads(CliRunner().invoke(cli.app, [*command, "--json"]).stdout)
    assert (told["source"], told["good"], sum(told["odd"].values()), len(told["missing"])) == ("dvqa", 2, 3, 1)
    assert told["first"]["empty"]["record"]


def test_numbers_in_a_spec_are_counted_too(tmp_path: Path) -> None:
    spec, location = laid("imagenet-21k", tmp_path)
    assert sources.check(spec, tmp_path / "specs", tmp_path).missing == [
        "imagenet_w21-train-{0000..2047}.tar: 2,047 files are not there, the first is imagenet_w21-train-0001.tar"
    ]
    next(location.glob("*.tar")).rename(location / "mine.tar")  # other people's tars have no numbers to miss
    assert sources.check(spec, tmp_path / "specs", tmp_path).missing == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tar", bytes(10240)),  # an empty archive
        ("a.txt", b""),
        ("page.html", PAGE),
        ("a.json", b'\xef\xbb\xbf \n[{"a": 1}]\n'),
        ("a.jsonl", b'{"text": "<html>"}\n{"text": "version https://git-lfs"}'),
        ("a.jsonl.zst", b"\x50\x2a\x4d\x18\x04\x00\x00\x00"),  # as pzstd begins
        ("a.jsonl.gz", gzip.compress(b"{}", mtime=0)),
        ("a.csv", b"url\tcaption\n"),
        ("notes", b"version https://git-lfs is a line of prose"),
    ],
)
def test_what_may_be_right_is_let_pass(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert mistaken(tmp_path / name) is None
    assert cut_short(tmp_path / name) is None
