"""What adapters read: arrays as streams, lines in any wrapping, tables in any form, pictures under any name."""

import gzip
import json
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import source_layouts as write

from solo.acquire import tables, upstream
from solo.acquire.image_files import Pictures
from solo.adapters import llava, table_columns, table_messages, url_questions
from solo.sample import Rejected


def statuses(items: object) -> list[str]:
    return [item.status if isinstance(item, Rejected) else "ok" for item in items]  # type: ignore[attr-defined]


@pytest.mark.parametrize("chunk", [16, 17, 64, 1 << 20])
def test_an_array_is_read_item_by_item_wherever_its_chunks_end(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream, "CHUNK_BYTES", chunk)
    records = [{"id": i, "text": "Käfer ]}, [{" * i, "nested": [[{"a": '\\"'}]]} for i in range(12)]
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf \n" + json.dumps(records, ensure_ascii=False, indent=chunk % 3).encode())
    assert [record for _, record in upstream.json_array(path)] == records
    raw = path.read_bytes()
    assert [json.loads(raw[at : at + len(item)]) for at, item in upstream.array_items(path)] == records


@pytest.mark.parametrize(
    ("content", "good"),
    [(b'[{"a": 1}, {"a": 2', 1), (b'[{"a": 1}', 1), (b'[{"a": 1}, {"a" 2}, {"a": 3}]', 1), (b"[", 0)],
)
def test_an_array_that_is_damaged_gives_what_is_before_and_one_row(content: bytes, good: int, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    records = [record for _, record in upstream.json_array(tmp_path / "a.json")]
    assert statuses(records) == ["ok"] * good + ["bad_record"]


def test_an_item_without_end_is_damage_and_not_all_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "CHUNK_BYTES", 100)
    monkeypatch.setattr(upstream, "ITEM_BYTES", 1_000)
    (tmp_path / "a.json").write_text('[{"a": "' + "x" * 10_000 + '"}, {"b": 1}]')
    assert [item for _, item in upstream.array_items(tmp_path / "a.json")] == [b""]


@pytest.mark.parametrize("content", ['{"a": 1}', "", "nonsense"])
def test_what_is_no_array_is_a_mistake_that_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"a\.json: expected a JSON array"):
        list(upstream.json_array(tmp_path / "a.json"))


@pytest.mark.parametrize("wrapping", ["", ".gz", ".zst", ".lz4", ".zip"])
def test_lines_come_out_of_any_wrapping(wrapping: str, tmp_path: Path) -> None:
    path, body = tmp_path / f"a.jsonl{wrapping}", '{"t": "é"}\n\nnot json\n'.encode()
    if wrapping == ".zip":
        with zipfile.ZipFile(path, "w") as out:
            out.writestr("inner.jsonl", body)
    elif wrapping == ".gz":
        path.write_bytes(gzip.compress(body))
    else:
        with pa.output_stream(str(path), compression="detect") as out:
            out.write(body)
    rows = list(upstream.json_lines(path))
    assert rows[0] == (f"a.jsonl{wrapping}:1", {"t": "é"}) and statuses([rows[1][1]]) == ["bad_record"]


def test_a_zip_of_lines_holds_one_file(tmp_path: Path) -> None:
    write.zipped(tmp_path / "a.jsonl.zip", {"a": b"{}", "b": b"{}"})
    with pytest.raises(ValueError, match="expected one file of JSON lines"):
        list(upstream.json_lines(tmp_path / "a.jsonl.zip"))


@pytest.mark.parametrize(("suffix", "sep"), [("csv", ","), ("tsv", "\t")])
def test_tables_of_text_name_their_pictures(suffix: str, sep: str, tmp_path: Path) -> None:
    lines = [["file", "q", "a"], ["a.png", "Wo?", '"Hier,\tda"'], ["gone.png", "Wo?", "x"], ["a.png", "", "x"]]
    lines += [["a.png", "Wo?", " "]]
    (tmp_path / f"t.{suffix}").write_text("\n".join(sep.join(line) for line in lines) + "\n", encoding="utf-8")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(write.picture(1))
    args = {"files": [f"*.{suffix}"], "image": "file", "image_files": "pictures", "question": "{q}", "answer": "A: {a}"}
    items = list(table_columns.read(tmp_path, source="s", **args))
    assert statuses(items) == ["ok", "missing_image", "bad_record", "ok"]  # "A: " alone is still an answer
    assert items[0].messages[1]["content"][0]["text"] == "A: Hier,\tda"  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"no column \['b'\]; it has \['file', 'q', 'a'\]"):
        list(table_columns.read(tmp_path, source="s", files=[f"*.{suffix}"], answer="{b}"))


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"t": ["x" * 50] * 500}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=r"a\.parquet: no Parquet file"):
        list(tables.rows(tmp_path, ["*.parquet"], ["t"]))


def test_turns_must_alternate_whatever_their_roles_are_called(tmp_path: Path) -> None:
    def turns(*roles: str) -> dict[str, object]:
        return {"said": [{"who": role, "what": f"{role} {i}"} for i, role in enumerate(roles)]}

    rows = [turns("Mensch", "KI"), turns("KI", "Mensch"), turns("Mensch", "tool"), turns("Mensch"), {"said": None}]
    write.parquet(tmp_path / "a.parquet", rows)
    args = {"messages": "said", "role": "who", "content": "what", "roles": {"Mensch": "user", "KI": "assistant"}}
    items = list(table_messages.read(tmp_path, source="s", **args))
    assert statuses(items) == ["ok", *["bad_record"] * 4]


def test_pictures_are_found_by_prefix_and_by_last_part(tmp_path: Path) -> None:
    write.zipped(tmp_path / "coco.zip", {"train2017/1.jpg": b"one", "val2017/2.jpg": b"two"})
    write.tar(tmp_path / "more.tar", [("./deep/3.jpg", b"three"), ("deep/4.jpg", b"")])
    by_prefix = Pictures(tmp_path, {"coco/": "coco.zip", "more/": "more.tar"})
    assert by_prefix.read("coco/train2017/1.jpg", "i") == b"one"
    assert by_prefix.read("more/deep/3.jpg", "i") == b"three"
    assert statuses([by_prefix.read(n, "i") for n in ("train2017/1.jpg", "coco/deep/3.jpg", "more/deep/4.jpg")]) == [
        "missing_image",
        "missing_image",
        "empty",
    ]
    flat = Pictures(tmp_path, ["coco.zip", "more.tar"], flat=True)
    assert [flat.read(n, "i") for n in ("any/where/2.jpg", "3.jpg")] == [b"two", b"three"]


def test_follow_ups_go_on_about_their_image_only(tmp_path: Path) -> None:
    write.zipped(tmp_path / "images.zip", {"1.jpg": write.picture(1), "2.jpg": write.picture(2)})
    first = [{"image": f"{i}.jpg", "conversations": write.talk("<image>\nDescribe.", f"A {i}.")} for i in (1, 2)]
    more = [{"image": "1.jpg", "conversations": write.talk("<image>\nWhy?", a)} for a in ("First.", "Second.")]
    (tmp_path / "chat.json").write_text(json.dumps(first))
    (tmp_path / "more.json").write_bytes(json.dumps(["odd", *more]).encode()[:-1] + b', {"image": "\xff"}]')
    items = list(llava.read(tmp_path, source="s", follow_ups="more.json"))
    answers = [[i["text"] for m in item.messages[1::2] for i in m["content"]] for item in items]  # type: ignore[union-attr]
    assert answers == [["A 1.", "First."], ["A 2."]]
    assert sum(i["type"] == "image" for m in items[0].messages for i in m["content"]) == 1  # type: ignore[union-attr]


def test_follow_ups_about_other_images_are_left_out_or_records_of_their_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write.zipped(tmp_path / "images.zip", {f"{i}.jpg": write.picture(i) for i in (1, 2)})
    first = [{"image": "1.jpg", "conversations": write.talk("<image>\nDescribe.", "A 1.")}]
    more = [
        {"image": f"{i}.jpg", "conversations": write.talk("<image>\nWhy?", a)}
        for i, a in ((1, "First."), (2, "Second."), (2, "Third."), (3, "Nowhere."))
    ]
    (tmp_path / "chat.json").write_text(json.dumps(first))
    (tmp_path / "more.json").write_text(json.dumps(more))
    assert statuses(llava.read(tmp_path, source="s", follow_ups="more.json")) == ["ok"]
    assert "more.json: 2 records are about images not in chat.json" in caplog.text
    caplog.clear()
    items = list(llava.read(tmp_path, source="s", follow_ups="more.json", follow_ups_alone=True))
    assert statuses(items) == ["ok", "ok", "missing_image"] and not caplog.text
    turns = [m["content"] for m in items[1].messages]  # type: ignore[union-attr]
    assert turns == [[{"type": "image"}, {"type": "text", "text": "\nWhy?"}], [{"type": "text", "text": "Second."}]]


def test_a_wrong_argument_of_a_url_list_with_questions_is_the_specs_fault(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"s: acquire\.args: .*'url_column'.* as for url_list\.download"):
        list(url_questions.download(tmp_path, source="s", job=None, question="What?", url="x"))  # type: ignore[arg-type]
