"""The page of a mix: shares asked and drawn, lengths, and every limit that bit, by hand."""

from pathlib import Path

import pyarrow as pa
import pytest
from test_curate import ledger, lengths, run, shard

from solo.artifact import Artifact
from solo.report import mix_pages, pages


@pytest.fixture(scope="module")
def lock(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, dict[str, Artifact]]:
    """Charts are cut by their category's quota, photos by max_epochs, text by a quota of each label and as twins."""
    root: Path = tmp_path_factory.mktemp("root")
    sha = [f"{i:064x}" for i in range(40)]
    charts = ledger("charts", [10] * 40, image_sha256=sha)
    photos = ledger("photos", [10] * 40, image_sha256=sha[:4] + [f"{i:064x}" for i in range(100, 136)])
    text = ledger("text", lengths(40, 2), meta_label=["x", "y"] * 20, meta_category=["books"] * 30 + ["news"] * 10)
    text = text.set_column(5, "n_images", pa.array([0] * 40)).append_column(
        "image_sha256", pa.array([None] * 40, "string")
    )
    shards = {name: shard(root, name, t) for name, t in (("charts", charts), ("photos", photos), ("text", text))}
    made = run(
        root,
        [
            {"source": "charts", "weight": 0.5, "category": "charts"},
            {"source": "photos", "weight": 0.25, "max_epochs": 0.5, "category": "photos"},
            {"source": "text", "weight": 0.25, "quotas": {"label": {"by": "meta_label", "samples": 5}}},
        ],
        shards,
        budget_tokens=1_600,
        unique=["image_sha256"],
        quotas={"charts": {"tokens": 600}},
    )
    return made, {f"shard/{name}": a for name, a in shards.items()}


def test_each_limit_that_bit_says_what_it_took(lock: tuple[Artifact, dict[str, Artifact]]) -> None:
    made, _ = lock
    assert [(r["limit"], r["on"], r["asked"], r["took away"], r["unit"]) for r in mix_pages.limit_rows(made)] == [
        ("max_epochs 0.5", "photos", 400, 220, "tokens"),
        ("quota, 600", "category charts", 800, 200, "tokens"),
        ("quota label, 5 samples of each meta_label", "text", None, 30, "samples"),
    ]


def test_shares_are_of_what_was_asked_and_of_what_was_drawn(lock: tuple[Artifact, dict[str, Artifact]]) -> None:
    made, _ = lock
    rows = {r["source"]: r for r in mix_pages.rows([made])}
    assert [rows[s]["share asked"] for s in ("charts", "photos", "text")] == ["50.0%", "25.0%", "25.0%"]
    tokens = {s: v["n_tokens"] for s, v in made.manifest.stats["sources"].items()}
    assert (tokens["charts"], tokens["photos"]) == (600, 180)
    assert rows["charts"]["share of tokens"] == f"{600 / sum(tokens.values()):.1%}"
    assert rows["photos"]["short of asked"] == 220 and rows["photos"]["category"] == "photos"


def test_the_page_tells_all_of_it(lock: tuple[Artifact, dict[str, Artifact]]) -> None:
    made, inputs = lock
    page = pages.page("curate", [made], inputs)
    for heading in ("By modality and category", "Limits that bit", "Left out, by reason", "Twins across sources"):
        assert f"### {heading}" in page
    lines = [line for line in page.splitlines() if line.startswith("| category |")]
    assert [line.split("|")[2].strip() for line in lines] == ["books", "charts", "news", "photos"]
    assert [line.split("|")[3].strip() for line in lines if "photos" in line] == ["25.0%"]
    assert page.count("data:image/png") == 2 and "duplicate" in page
    plain = run(made.path.parents[2], [{"source": "text", "epochs": 1}], {"text": inputs["shard/text"]})
    assert "None: each source gave what was asked of it." in pages.page("curate", [plain], inputs)
