"""Writers of a few records in the exact published layout of each source, odd ones included."""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Write = Callable[[Path], None]
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def picture(shade: int, form: str = "PNG") -> bytes:
    """64 x 32: one row of two patches; between its two marks that makes 2 vision and 2 text tokens."""
    out = io.BytesIO()
    Image.new("RGB", (64, 32), (shade, 90, 30)).save(out, form)
    return out.getvalue()


def parquet(path: Path, rows: Sequence[Mapping[str, object]], schema: pa.Schema | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema), path)


def tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w", format=tarfile.USTAR_FORMAT) as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))


def zipped(path: Path, members: Mapping[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as out:
        for name, data in members.items():
            out.writestr(name, data)


def talk(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def imagenet(folder: Path) -> None:
    members = [("n02077923_18.cls", b"7"), ("n02077923_18.jpg", picture(1, "JPEG")), ("n02077923_19.jpg", b"")]
    members += [("n99999999_1.cls", b"9"), ("n99999999_1.jpg", picture(2, "JPEG")), ("n02077923_20.cls", b"7")]
    tar(folder / "imagenet_w21-train-0000.tar", members)
    (folder / "mapping.txt").write_text("n02077923 Sea-Lion_pup\nn02121808 domestic cat\n")


def slimpajama(*names: str) -> Write:
    def write(folder: Path) -> None:
        def line(body: str, name: str) -> str:
            return json.dumps({"text": body, "meta": {"redpajama_set_name": name}}, ensure_ascii=False)

        lines = [line("A naïve proof.", "RedPajamaArXiv"), line("From the web.", "RedPajamaCommonCrawl")]
        lines += [line("Also.", "RedPajamaC4"), line(" \n", "RedPajamaBook"), '{"text": "cut', lines[0]]
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with pa.CompressedOutputStream(str(path), "zstd") as out:
                out.write(("\n".join(lines) + "\n").encode())

    return write


def url_list(file: str, url: str, caption: str, **more: str) -> Write:
    """One row that is served, one that is gone, one without caption, one repeated; `origin` stands for the web."""

    def write(folder: Path) -> None:
        base = next(parent for parent in folder.parents if parent.name == ".upstream").parent
        origin = base / "specs" / "origin"
        origin.mkdir()
        (origin / "a.jpg").write_bytes(picture(9, "JPEG"))
        (origin / "routes.json").write_text('{"/gone.jpg": {"status": 404}}')
        given = [("a.jpg", "Ein roter Käfer."), ("gone.jpg", "Lost."), ("a.jpg", ""), ("a.jpg", "Ein roter Käfer.")]
        rows = [{url: f"http://images.example.test/{name}", caption: said} | more for name, said in given]
        parquet(folder / file if file else folder, rows)

    return write


def websight(folder: Path) -> None:
    schema = pa.schema([("image", IMAGE_TYPE), ("text", pa.string()), ("llm_generated_idea", pa.string())])
    good = {"image": {"bytes": picture(1), "path": None}, "text": "<html>\n<body>Hi</body></html>"}
    rows = [good, good | {"text": ""}, good | {"image": {"bytes": None, "path": "x.png"}}, good | {"image": None}]
    parquet(folder / "train-00000-of-00738-80a58552f2fb3344.parquet", rows, schema)


def cc3m(folder: Path) -> None:
    members = [("000000000.jpg", picture(1, "JPEG")), ("000000000.json", b'{"url": "x"}')]
    members += [("000000000.txt", "a river by a café".encode()), ("000000001.jpg", picture(2, "JPEG"))]
    members += [("000000002.txt", b"no picture"), ("000000003.jpg", picture(3, "JPEG")), ("000000003.txt", b" ")]
    members += [("000000004.jpg", picture(4, "JPEG")), ("000000004.txt", b"\xff\xfe")]
    tar(folder / "cc3m-train-0000.tar", members)
    tar(folder / "cc3m-validation-0000.tar", members[:3])


def detailed(folder: Path) -> None:
    def record(i: str, image: str, answer: str) -> dict[str, object]:
        asked = f"<img>{image}</img> Generate the detailed caption in English: "
        return {"id": i, "conversations": [{"from": "user", "value": asked}, {"from": "assistant", "value": answer}]}

    records = [record("0", "data/1.jpg", "A cat — asleep."), record("1", "data/gone.jpg", "A dog.")]
    records += [record("2", "data/1.jpg", " "), {"id": "3", "conversations": []}]
    folder.mkdir(parents=True)
    (folder / "densecap.json").write_text(json.dumps(records))
    zipped(folder / "densecap_data.zip", {"data/1.jpg": picture(1, "JPEG")})


def llava(records_file: str, archive: str, member: str, records: Sequence[dict[str, object]]) -> Write:
    def write(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / records_file).write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
        if archive.endswith(".zip"):
            zipped(folder / archive, {member: picture(1, "JPEG")})
        else:
            (folder / archive / member).parent.mkdir(parents=True)
            (folder / archive / member).write_bytes(picture(1, "JPEG"))

    return write


def allava(part: str, archive: str, image: str, member: str) -> Write:
    caption = {"id": f"allava_{part}_cap_1", "image": image, "conversations": talk("<image>\nDescribe.", "A café.")}
    lost = {"id": f"allava_{part}_cap_2", "image": "gone.jpeg", "conversations": talk("<image>\nDescribe.", "Lost.")}
    both = {"id": f"allava_{part}_inst_1", "image": image, "conversations": talk("<image>\nWhy?", "It rains.")}
    asked = image.replace(".", "0.")
    alone = {"id": f"allava_{part}_inst_2", "image": asked, "conversations": talk("<image>\nWho?", "A cat.")}

    def write(folder: Path) -> None:
        llava(f"ALLaVA-Caption-{part.upper()}-4V.json", archive, member, [caption, lost])(folder)
        (folder / f"ALLaVA-Instruct-{part.upper()}-4V.json").write_text(json.dumps([alone, both]))
        zipped(folder / archive, {member: picture(1, "JPEG"), member.replace(".", "0."): picture(2, "JPEG")})

    return write


def mmc4(folder: Path) -> None:
    def document(names: Sequence[str], at: object = 1) -> dict[str, object]:
        one = {"raw_url": "http://x.test/a", "matched_text_index": at, "matched_sim": 0.3, "face_detections": None}
        more = {"url": "http://x.test", "similarity_matrix": [[0.3, 0.2, 0.1]], "could_have_url_duplicate": 0}
        return {"text_list": ["One.", "Zwei Käfer.", ""], "image_info": [one | {"image_name": n} for n in names]} | more

    documents = [document(["a.jpg", "b.jpg"]), document(["a.jpg", "gone.jpg"]), document(["a.jpg"], at=7)]
    documents += [document([]), document(["a.jpg"]) | {"text_list": ["", " "]}]
    lines = "\n".join(json.dumps(d, ensure_ascii=False) for d in documents)
    zipped(folder / "docs_no_face_shard_0_v3.jsonl.zip", {"docs_no_face_shard_0_v3.jsonl": lines.encode()})
    (folder / "images").mkdir()
    (folder / "images/a.jpg").write_bytes(picture(1, "JPEG"))
    (folder / "images/b.jpg").write_bytes(picture(2, "JPEG"))


def cauldron(said: str, reply: str, *, answer: str = "assistant") -> Write:
    """Two pairs about one picture; a picture without bytes, an empty answer, no pair, and the first row again."""

    def write(folder: Path) -> None:
        pair = [("user", pa.string()), (answer, pa.string()), ("source", pa.string())]
        schema = pa.schema([("images", pa.list_(IMAGE_TYPE)), ("texts", pa.list_(pa.struct(pair)))])
        texts = [{"user": said, answer: reply}, {"user": "Où est-ce?", answer: "東京"}]
        good = {"images": [{"bytes": picture(1), "path": None}], "texts": texts}
        rows = [good, good | {"images": [{"bytes": None, "path": "gone.png"}]}]
        rows += [good | {"texts": [{"user": said, answer: ""}]}, good | {"texts": []}, good]
        parquet(folder / "train-00000-of-00001-0496147841e1c23a.parquet", rows, schema)

    return write


def messages_table(file: str, column: str, **more: object) -> Write:
    def write(folder: Path) -> None:
        def turns(*said: tuple[str, str]) -> list[dict[str, str]]:
            return [{"content": content, "role": role} for role, content in said]

        talks = [
            turns(
                ("system", "Be brief."), ("user", "Größe?"), ("assistant", "Yes."), ("user", "x"), ("assistant", "No")
            ),
            turns(("user", "Hi"), ("user", "Hi again")),
            turns(("user", "Hi"), ("assistant", "")),
            [],
        ]
        parquet(folder / file, [{column: t} | more for t in talks])

    return write


def ultra_interact(folder: Path) -> None:
    row = {"task": "Math_CoT", "dataset": "gsm8k", "instruction": "2 + 2 = ?", "response": "4 €", "id": "a"}
    rows = [row, row | {"response": ""}, row | {"instruction": ""}]
    parquet(folder / "0000_sft.parquet", [r | {"parent_id": "b"} for r in rows])


def bundle(folder: Path) -> None:
    records = [
        {"image": "images/1002217.jpg", "conversations": ["<image>\nWas ist das?", "Ein Hut", "Color?", "red"]},
        {"image": "images/1002217.jpg", "conversations": [{"value": "Where?\n<image>"}, {"value": "Here"}]},
        {"conversations": [{"value": "Hi"}, {"value": "Hello"}]},
        {"image": "images/7.jpg", "conversations": ["<image>\nWhat?", "x"]},
        {"image": "images/1002217.jpg", "conversations": ["<image>\nWhat?", ""]},
        {"conversations": []},
    ]
    folder.mkdir(parents=True)
    (folder / "all_data.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records))
    tar(folder / "images/chunk_1.tar.gz", [("909538.jpg", picture(2, "JPEG")), ("1002217.jpg", picture(1, "JPEG"))])
    tar(folder / "images/chunk_10.tar.gz", [("138683.jpg", picture(3, "JPEG"))])
