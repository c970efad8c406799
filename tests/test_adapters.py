"""Each adapter against a hand-written layout with odd records; the truth is spelled out here."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile

import pytest
from PIL import Image

from solo.adapters import conversations_jsonl, jsonl_text, llava, questions, ultrachat, webdataset_labels
from solo.sample import IMAGE, Rejected, Sample, make_key, text


def picture(shade=0):
    out = io.BytesIO()
    Image.new("RGB", (8, 6), (shade, 0, 0)).save(out, "JPEG")
    return out.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_lines(path, records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def said(item):
    """A sample as (role, content) pairs with the image as None; a rejection as (identity, status)."""
    if isinstance(item, Rejected):
        return (item.identity, item.status)
    return [(m["role"], [None if i["type"] == "image" else i["text"] for i in m["content"]]) for m in item.messages]


def test_webdataset_labels(tmp_path):
    truncated = picture(3)[:40]
    write_tar(
        tmp_path / "train-00000.tar",
        [
            ("n01_1.jpg", picture(1)),
            ("./n01_2.JPEG", picture(2)),
            ("n01_3.jpg", truncated),
            ("n01_4.jpg", b""),
            ("n01_5.cls", b"7"),
            ("n99_1.jpg", picture(4)),
            ("n03_1.jpg", picture(5)),
            ("n02_1.cls", b"7"),
            ("n02_1.jpg", picture(6)),
        ],
    )
    write_tar(tmp_path / "train-00001.tar", [("n02_9.jpg", picture(7)), ("n02_10.jpg", picture(8) * 9)])
    whole = (tmp_path / "train-00001.tar").read_bytes()
    (tmp_path / "train-00001.tar").write_bytes(whole[: 512 + 1024 + 512 + 600])
    (tmp_path / "mapping.txt").write_text("n01 Sea-Lion_pup\nn02 cup\nn03 domestic cat\n\n")
    items = list(webdataset_labels.read(tmp_path, source="s"))
    label = [("assistant", [None, "Sea Lion pup"])]
    assert [said(item) for item in items] == [
        label,
        label,
        label,
        ("n01_4", "empty"),
        ("n01_5", "missing_image"),
        ("n99_1", "no_label"),
        ("n03_1", "no_label"),
        [("assistant", [None, "cup"])],
        [("assistant", [None, "cup"])],
        ("train-00001.tar after n02_9", "bad_record"),
    ]
    assert items[2].images == (truncated,)  # kept as it came: filter judges pixels
    assert items[0].key == make_key("s", "n01_1")
    assert items[0].meta == {"id": "n01_1", "wnid": "n01", "label": "Sea Lion pup"}


def test_tar_with_damaged_header_is_not_taken_for_a_shorter_one(tmp_path):
    write_tar(tmp_path / "a.tar", [("n01_1.jpg", picture(1)), ("n01_2.jpg", picture(2))])
    raw = bytearray((tmp_path / "a.tar").read_bytes())
    second = raw.index(b"n01_2.jpg")
    raw[second + 148] ^= 0x55  # checksum field
    (tmp_path / "a.tar").write_bytes(raw)
    (tmp_path / "mapping.txt").write_text("n01 cup\n")
    items = [said(item) for item in webdataset_labels.read(tmp_path, source="s")]
    assert items == [[("assistant", [None, "cup"])], ("a.tar after n01_1", "bad_record")]


def slim(body, name="RedPajamaBook"):
    return {"text": body, "meta": {"redpajama_set_name": name}}


def test_jsonl_text(tmp_path):
    rows = [
        slim("one"),
        slim("two", "RedPajamaC4"),
        slim(" \n"),
        '{"text": "cut',
        '["a list"]',
        {"text": 7, "meta": {"redpajama_set_name": "RedPajamaBook"}},
        {"text": "of no set"},
        '{"text": "\\ud800", "meta": {}}',
        "",
        slim("one"),
    ]
    write_lines(tmp_path / "b.jsonl", rows)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as out:
        out.write(json.dumps(slim("zipped")) + "\n")
    items = list(jsonl_text.read(tmp_path, source="s", exclude_sets=["RedPajamaC4"]))
    assert [said(item) for item in items] == [
        [("assistant", ["zipped"])],
        [("assistant", ["one"])],
        ("b.jsonl:2", "excluded_set"),
        ("b.jsonl:3", "empty"),
        ("b.jsonl:4", "bad_record"),
        ("b.jsonl:5", "bad_record"),
        ("b.jsonl:6", "bad_record"),
        ("b.jsonl:7", "bad_record"),
        ("b.jsonl:8", "bad_record"),
        [("assistant", ["one"])],
    ]
    assert items[1].key == items[-1].key  # content is identity: acquire drops the second as duplicate_row
    assert items[1].meta == {"id": "b.jsonl:1", "category": "RedPajamaBook"}


def test_damaged_compressed_file_is_a_row(tmp_path):
    packed = gzip.compress(b"".join(json.dumps(slim(f"{i} " * 50)).encode() + b"\n" for i in range(400)))
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    items = list(jsonl_text.read(tmp_path, source="s"))
    assert isinstance(items[-1], Rejected) and items[-1].status == "bad_record"
    assert any(isinstance(item, Sample) for item in items[:-1])


def talk(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def test_llava(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("a.jpg", picture())
        archive.writestr("zero.jpg", b"")
    records = [
        {"id": "1", "image": "a.jpg", "conversations": talk("<image>\nWhat?", "A cup.")},
        {"id": "2", "image": "a.jpg", "conversations": talk("Say.\n<image>", "A cup.", "More?", "No.")},
        {"id": "3", "image": "gone.jpg", "conversations": talk("<image>", "A cup.")},
        {"id": "4", "image": "a.jpg"},
        {"id": "5", "image": "a.jpg", "conversations": talk("<image> <image>", "Two.")},
        {"id": "6", "image": "a.jpg", "conversations": talk("no mark", "A cup.")},
        {"id": "7", "image": "a.jpg", "conversations": talk("<image>", " ")},
        {"id": "8", "image": "a.jpg", "conversations": talk("<image>")},
        {"id": "9", "image": "a.jpg", "conversations": talk("<image>", "x")[::-1]},
        {"id": "10", "conversations": talk("Text only?", "Yes.")},
        {"id": "11", "image": "zero.jpg", "conversations": talk("<image>", "A cup.")},
        {"id": "12", "image": 5, "conversations": talk("<image>", "A cup.")},
        17,
    ]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    items = list(llava.read(tmp_path, source="s"))
    assert [said(item) for item in items] == [
        [("user", [None, "\nWhat?"]), ("assistant", ["A cup."])],
        [("user", ["Say.\n", None]), ("assistant", ["A cup."]), ("user", ["More?"]), ("assistant", ["No."])],
        ("3", "missing_image"),
        ("4", "bad_record"),
        ("5", "bad_record"),
        ("6", "bad_record"),
        ("7", "bad_record"),
        ("8", "bad_record"),
        ("9", "bad_record"),
        [("user", ["Text only?"]), ("assistant", ["Yes."])],
        ("11", "empty"),
        ("12", "bad_record"),
        ("chat.json[12]", "bad_record"),
    ]
    assert items[0].images == (picture(),) and items[0].meta == {"id": "1", "image": "a.jpg"}


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/hostname", "link.jpg"])
def test_records_cannot_read_outside_the_image_folder(tmp_path, name):
    (tmp_path / "secret.jpg").write_bytes(picture())
    (tmp_path / "images").mkdir()
    (tmp_path / "images/link.jpg").symlink_to(tmp_path / "secret.jpg")
    (tmp_path / "chat.json").write_text(json.dumps([{"id": "1", "image": name, "conversations": talk("<image>", "x")}]))
    items = list(llava.read(tmp_path, source="s", images="images"))
    assert [said(item) for item in items] == [("1", "missing_image")]
    assert (tmp_path / "images" / name).exists() or name.startswith("..")  # the plain way would have read it


def test_conversations_jsonl(tmp_path):
    write_tar(tmp_path / "images.0.tar", [("d/a.png", picture(1))])
    write_tar(tmp_path / "images.1.tar", [("d/b.png", picture(2))])
    records = [
        {"image": "d/a.png", "conversations": [{"value": "<image>\nWhich?"}, {"value": " one"}]},
        {"image": "d/b.png", "conversations": ["Which?\n<image>", "two", "And <image>?", "three"]},
        {"image": "d/b.png", "conversations": ["<image>", "two"]},
        {"conversations": ["Hi", "Hello"]},
        {"image": "d/a.png", "conversations": ["<image>\nWhich?", ""]},
        {"image": "d/c.png", "conversations": ["<image>\nWhich?", "one"]},
        {"image": "d/a.png", "conversations": ["<image>\nWhich?"]},
        {"conversations": ["<image>\nWhich?", "one"]},
        {"conversations": []},
        {"conversations": [{"text": "x"}, "y"]},
        {},
    ]
    write_lines(tmp_path / "all_data.jsonl", records)
    items = list(conversations_jsonl.read(tmp_path, source="s", images="images.*.tar"))
    assert [said(item) for item in items] == [
        [("user", [None, "Which?"]), ("assistant", [" one"])],
        [
            ("user", [None, "Which?"]),
            ("assistant", ["two"]),
            ("user", ["And <image>?"]),
            ("assistant", ["three"]),
        ],
        [("user", [None]), ("assistant", ["two"])],
        [("user", ["Hi"]), ("assistant", ["Hello"])],
        ("all_data.jsonl:5", "bad_record"),
        ("all_data.jsonl:6", "missing_image"),
        ("all_data.jsonl:7", "bad_record"),
        ("all_data.jsonl:8", "missing_image"),
        ("all_data.jsonl:9", "empty"),
        ("all_data.jsonl:10", "bad_record"),
        ("all_data.jsonl:11", "bad_record"),
    ]
    assert [item.images for item in items[:2]] == [(picture(1),), (picture(2),)]


def test_ultrachat(tmp_path):
    records = [
        {"id": "0", "data": ["Hi", "Hello", "More", "Yes"]},
        {"id": "1", "data": []},
        {"id": "2", "data": ["Hi"]},
        {"id": "3", "data": ["Hi", 4]},
        {"id": "4", "data": ["", "Hello"]},
        {"id": "5"},
        {"id": "0", "data": ["Same id", "other talk"]},
    ]
    write_lines(tmp_path / "ultrachat_0.jsonl", records)
    items = list(ultrachat.read(tmp_path, source="s"))
    assert [said(item) for item in items] == [
        [("user", ["Hi"]), ("assistant", ["Hello"]), ("user", ["More"]), ("assistant", ["Yes"])],
        ("ultrachat_0.jsonl:2", "empty"),
        *((f"ultrachat_0.jsonl:{n}", "bad_record") for n in (3, 4, 5, 6)),
        [("user", ["Same id"]), ("assistant", ["other talk"])],
    ]
    assert items[0].key != items[-1].key  # upstream ids restart in each file


def test_questions(tmp_path):
    write_tar(tmp_path / "images.tar", [("a.png", picture())])
    good = {"question_id": "q1", "image": "a.png", "question": "Which?", "answer": "one", "category": "digits"}
    records = [
        good,
        good | {"question_id": 5},
        good | {"question_id": "q2", "answer": None},
        good | {"question_id": "q3", "image": "b.png"},
        good | {"question_id": "q4", "question": ""},
        {"question_id": "q5", "question": "2 + 2?", "answer": "4"},
    ]
    write_lines(tmp_path / "questions.jsonl", records)
    items = list(questions.read(tmp_path, source="b"))
    turns = (
        {"role": "user", "content": [IMAGE, text("Which?")]},
        {"role": "assistant", "content": [text("one")]},
    )
    meta = {"id": "q1", "question_id": "q1", "category": "digits", "image": "a.png"}
    assert items[0] == Sample(make_key("b", "q1"), "b", (picture(),), turns, meta)
    assert [said(item) for item in items[1:]] == [
        ("questions.jsonl:2", "bad_record"),
        ("q2", "bad_record"),
        ("q3", "missing_image"),
        ("q4", "bad_record"),
        [("user", ["2 + 2?"]), ("assistant", ["4"])],
    ]


@pytest.mark.parametrize(
    ("module", "missing"),
    [
        (webdataset_labels, "mapping.txt"),
        (llava, "chat.json"),
        (conversations_jsonl, "images.tar"),
        (questions, "images.tar"),
        (ultrachat, "*.jsonl"),
    ],
)
def test_a_missing_file_is_named_with_what_is_there(tmp_path, module, missing):
    (tmp_path / "other.bin").touch()
    with pytest.raises(ValueError, match=r"other\.bin") as error:
        list(module.read(tmp_path, source="s"))
    assert missing in str(error.value) and "\n" not in str(error.value)
