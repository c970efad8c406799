"""A tiny recipe on real code paths: two sources, one mix, one stage, one benchmark, written by the test."""

import io
import json
import random
import tarfile
from pathlib import Path

import yaml
from PIL import Image

from solo.acquire.part import content_sha256

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 60),
    "blue": (30, 60, 220),
    "white": (245, 245, 245),
    "black": (10, 10, 10),
    "brown": (120, 70, 30),
}
LICENCE = {"id": "CC0-1.0", "url": "made by the test"}


def picture(colour: tuple[int, int, int], seed: int, side: int = 40) -> bytes:
    noise = random.Random(seed)
    image = Image.new("RGB", (side, side), colour)
    for _ in range(20):
        image.putpixel((noise.randrange(side), noise.randrange(side)), tuple(noise.randrange(256) for _ in range(3)))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_data(specs: Path) -> None:
    members = {f"n{i:08d}_{j}.png": picture(c, j) for i, c in enumerate(COLOURS.values()) for j in range(8)}
    members["n00000000_dup.png"] = members["n00000000_0.png"]
    members["n00000001_cut.png"] = members["n00000001_1.png"][:60]
    members["n00000099_0.png"] = picture((1, 2, 3), 5)
    write_tar(specs / "data" / "pictures" / "train-00000.tar", members)
    mapping = "".join(f"n{i:08d} {name}\n" for i, name in enumerate(COLOURS))
    (specs / "data" / "pictures" / "mapping.txt").write_text(mapping)
    words = ("the", "cat", "sat", "on", "a", "mat", "while", "seven", "green", "birds", "watched", "an", "old", "wall")
    rng = random.Random(7)
    lines = [" ".join(rng.choices(words, k=rng.randrange(5, 120))) for _ in range(40)]
    records = [{"text": t, "meta": {"redpajama_set_name": "RedPajamaWikipedia"}} for t in lines]
    records += [{"text": "from the web", "meta": {"redpajama_set_name": "RedPajamaC4"}}, records[0]]
    (specs / "data" / "text").mkdir(parents=True)
    (specs / "data" / "text" / "part_0.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    names = list(COLOURS)
    write_tar(specs / "data" / "bench" / "images.tar", {f"{n}.png": picture(COLOURS[n], 99) for n in names})
    questions = [
        {"question_id": str(i), "image": f"{n}.png", "question": "What colour?", "answer": n, "category": "colour"}
        for i, n in enumerate(names)
    ]
    (specs / "data" / "bench" / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))


def edit(specs: Path, file: str, **fields: object) -> None:
    """Set fields of one spec; a dotted name reaches inside (`filter.keep.length`)."""
    path = specs / file
    spec = yaml.safe_load(path.read_text()) if path.is_file() else {}
    for dotted, value in fields.items():
        *outer, leaf = dotted.split("__")
        inner = spec
        for key in outer:
            inner = inner[key]
        inner[leaf] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(spec, sort_keys=False))


def pin(specs: Path) -> None:
    """Write the revisions that match the data now."""
    for file, data in (
        ("sources/toy-pictures.yaml", "data/pictures"),
        ("sources/toy-text.yaml", "data/text"),
        ("benchmarks/toy-colours.yaml", "data/bench"),
    ):
        edit(specs, file, revision="sha256:" + content_sha256(specs / data))


def write_specs(specs: Path, *, packs_per_step: int = 2) -> Path:
    """The whole tiny recipe under `specs`; returns it."""
    write_data(specs)
    edit(
        specs,
        "sources/toy-pictures.yaml",
        name="toy-pictures",
        title="Colours",
        licence=LICENCE,
        revision="",
        modality="image-text",
        acquire={
            "location": "data/pictures",
            "adapter": "webdataset_labels.read",
            "args": {"mapping": "mapping.txt"},
            "samples_per_shard": 20,
        },
        filter={
            "signals": ["image.size", "image.hashes", "text.size"],
            "keep": {"decodes": "decodes", "min_side": "least(width_px, height_px) >= 16"},
            "unique": ["image_sha256"],
        },
        shard={"samples_per_shard": 20, "template": "plain"},
    )
    edit(
        specs,
        "sources/toy-text.yaml",
        name="toy-text",
        title="Text",
        licence=LICENCE,
        revision="",
        modality="text",
        acquire={
            "location": "data/text",
            "adapter": "jsonl_text.read",
            "args": {"exclude_sets": ["RedPajamaC4"]},
            "samples_per_shard": 50,
        },
        filter={"signals": ["text.size"], "keep": {"length": "n_chars >= 10"}, "unique": ["text_sha256"]},
        shard={"samples_per_shard": 50, "template": "plain"},
    )
    edit(
        specs,
        "mixes/toy.yaml",
        name="toy",
        title="Both",
        seed=1,
        sources=[{"source": "toy-pictures", "epochs": 2.0}, {"source": "toy-text", "epochs": 1.0}],
    )
    edit(
        specs,
        "benchmarks/toy-colours.yaml",
        name="toy-colours",
        title="Colours",
        licence=LICENCE,
        revision="",
        location="data/bench",
        adapter="questions.read",
        args={},
        template="inst",
        scorer="exact.match",
        max_new_tokens=2,
        chance=1 / len(COLOURS),
    )
    write_recipe(specs, packs_per_step)
    pin(specs)
    return specs


def write_recipe(specs: Path, packs_per_step: int) -> None:
    sample = yaml.safe_load((Path(__file__).parents[1] / "datasets_spec" / "recipes" / "sample.yaml").read_text())
    model = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    stage = {"name": "toy-stage", "mix": "toy", "pack_tokens": 256, "batch_packs": packs_per_step}
    edit(
        specs,
        "recipes/toy.yaml",
        name="toy",
        title="Toy",
        seed=1,
        tokens=sample["tokens"],
        model=sample["model"] | model | {"num_key_value_heads": 1},
        stages=[sample["stages"][0] | stage | {"checkpoint_every_steps": 2}],
        benchmarks=["toy-colours"],
    )
