"""pages: every part's page renders, stays small, and shows hostile text letter by letter."""

import html
import io
import json
import re

import duckdb
import finished
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from markdown_it import MarkdownIt
from PIL import Image

from solo.artifact import Artifact, Manifest
from solo.line import PARTS
from solo.report import charts, filter_pages, host_pages, markdown, pages
from solo.spec import Filter

LIMIT_BYTES = 256_000
CONTROLS = ("\u202e", "\u202c", "\u0007")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> finished.Recipe:
    return finished.make(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def written(recipe: finished.Recipe) -> dict[str, str]:
    found = {part: pages.page(part, recipe.of(part), inputs=recipe.made) for part in PARTS}
    sources = pages.details("filter", recipe.of("filter"), recipe.made)
    found |= {f"filter of {name}": page for name, page in sources.items()}
    return found | {"overview": pages.overview(list(recipe.made.values()))}


def rendered(page: str) -> str:
    """With raw HTML allowed, as a browser would see a page that no sanitiser had touched."""
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(page)


def test_pages_are_small_and_not_empty(written: dict[str, str]) -> None:
    for part, page in written.items():
        assert 200 < len(page.encode()) < LIMIT_BYTES, part
        assert page.startswith("# ")


def test_pages_hold_no_markup_from_the_data(written: dict[str, str]) -> None:
    for part, page in written.items():
        seen = rendered(page)
        assert not re.search(r"<(script|a|b|i|iframe|del|s)\b", seen), part
        assert all(src.startswith("data:image/") for src in re.findall(r'<img src="([^"]*)', seen)), part
        assert "http://" not in page and "www.evil" not in page and "me@" not in page, part


def test_hostile_captions_are_really_there_and_readable(written: dict[str, str]) -> None:
    """The guard of the test above: the captions reached the pages, as text."""
    for part, n in (("filter", 2), ("evaluate", 5)):
        text = html.unescape(re.sub(r"<[^>]+>", " ", rendered(written[part]))).replace("\u200b", "")
        shown = [h for h in finished.HOSTILE if h[:20] in text]
        assert len(shown) >= n, (part, text)
        assert not any(c in text for c in CONTROLS)


@pytest.mark.parametrize("text", [*finished.HOSTILE, "_a_ __b__ n_tokens", "- x\n\n1. y\n> z\n    code", "<" * 500])
def test_escaped_text_is_shown_letter_by_letter(text: str) -> None:
    page = rendered(f"| h |\n| --- |\n| {markdown.escape(text, limit=1000)} |\n")
    cell = re.findall(r"<td>(.*)</td>", page)
    assert len(cell) == 1 and "<" not in cell[0]
    clean = "".join(c for c in " ".join(text.split()) if c not in CONTROLS)
    assert html.unescape(cell[0]).replace("\u200b", "") == clean


def test_tables_are_rectangular(written: dict[str, str]) -> None:
    for part, page in written.items():
        for block in page.split("\n\n"):
            rows = [line for line in block.splitlines() if line.startswith("|")]
            assert len({row.count("|") for row in rows}) <= 1, (part, rows[:3])


def test_pages_tell_the_counts(written: dict[str, str], recipe: finished.Recipe) -> None:
    assert "no_label" in written["acquire"] and "| 51 | 50 | 1 |" in written["acquire"]
    assert "duplicate_image_sha256" in written["filter"]
    assert "data:image/jpeg" in written["filter"] and "data:image/jpeg" in written["evaluate"]
    assert "epochs 2" in written["curate"]
    assert "1 duplicate_row, 1 excluded_set" in written["report"]
    pack = recipe.of("pack")[0].manifest.stats
    shown = [f"{pack['fill']:.3%}", f"{pack['fill_limit']:.3%}", "as they arrived", "no order is below", "holds"]
    assert all(text in written["pack"] for text in shown)
    assert f"{pack['attention_imbalance']['2_ranks']['ordered']['max']:.3f}" in written["pack"]
    assert f"{pack['proof']['tolerance']:g} nats allowed" in written["pack"]
    assert f"{recipe.made['train/toy-stage'].manifest.stats['n_tokens']:,}" in written["overview"]


def test_the_page_of_a_source_tells_its_rules_and_shows_its_clusters(written: dict[str, str]) -> None:
    page = written["filter of toy-pictures"]
    dropped = [line.split("|")[1:5] for line in page.split("\n\n")[2].splitlines()[2:]]
    left = [int(cells[3].replace(",", "")) for cells in dropped]
    lost = [int(cells[2].replace(",", "")) for cells in dropped]
    assert all(before - n == after for before, after, n in zip(left, left[1:], lost[1:], strict=False))
    assert "## Duplicates" in page and "## Resolution" in page and "data:image/png" in page


def test_a_string_that_quotes_code_is_no_threshold(recipe: finished.Recipe) -> None:
    con = duckdb.connect()
    con.execute("CREATE TABLE judged AS SELECT 'x' AS meta_label, 3 AS n_chars, TRUE AS keep")
    quoting = "meta_label <> ' AND (SELECT count(*) FROM read_text(''/etc/passwd'')) > 0 AND n_chars > 2 AND '"
    spec = Filter(signals=(), keep={"a": quoting, "b": "n_chars >= 2 AND meta_label = 'x'"})
    assert [(p.title, p.limit) for p in filter_pages._cuts(con, spec)] == [("n_chars", 2.0), ("n_chars", 2.0)]


@pytest.mark.parametrize("part", PARTS)
def test_table_rows_are_flat(part: str, recipe: finished.Recipe) -> None:
    rows = pages.table(part, recipe.of(part))
    assert rows and len({tuple(row) for row in rows}) == 1
    assert all(isinstance(value, str | int | float) for row in rows for value in row.values())
    assert "NaN" not in json.dumps(rows)


def test_pages_of_part_of_a_recipe(recipe: finished.Recipe) -> None:
    """A run until=filter has an overview too, and a page without acquire's pictures still renders."""
    some = [*recipe.of("acquire"), *recipe.of("filter")]
    assert "kept by filter" in pages.overview(some)
    assert "data:image/jpeg" not in pages.page("filter", recipe.of("filter"))


def test_a_page_over_its_budget_says_what_it_left_out() -> None:
    page = markdown.join(["# x", "y" * 150_000, "z" * 150_000, "last"])
    assert len(page.encode()) < LIMIT_BYTES
    assert "last" in page and "1 more blocks do not fit" in page


def test_a_long_table_says_how_much_longer_it_is() -> None:
    rows = [{"n": i} for i in range(markdown.N_ROWS + 5)]
    assert markdown.table(rows).endswith("and 5 more rows")


def test_equal_numbers_give_an_equal_chart() -> None:
    rows = {"a": {"x": 3.0, "y": 1.0}, "$b_{1}$": {"x": 2.0}}
    one, two = (charts.stacked("t", rows, unit="n") for _ in range(2))
    assert one == two
    assert Image.open(io.BytesIO(one)).width == 700


@pytest.mark.parametrize("values", [[], [4.0] * 9, [float("nan"), 2.0], [0.0, 0.0], [1e-3, 1e9]])
def test_histograms_of_awkward_values(values: list[float]) -> None:
    panel = charts.Panel("p", {"kept": np.array(values), "dropped": np.zeros(0)}, log=True)
    assert charts.histograms("t", [panel], unit="n").startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0"), (999, "999"), (1234, "1.23k"), (5_491_625_358, "5.49G"), (0.6231, "0.62")]
)
def test_short_numbers(value: float, shown: str) -> None:
    assert charts.short(value) == shown


@pytest.mark.parametrize(("share", "bar"), [(0, ""), (1e-9, "\u258f"), (0.5, "\u2588" * 8), (2, "\u2588" * 16)])
def test_bars(share: float, bar: str) -> None:
    assert markdown.bar(share) == bar


def test_hosts_tell_what_came_what_stays_and_what_was_lost(tmp_path) -> None:
    hosts = [("a.test", 5), ("<b>.test", 3)] + [(f"h{i}.test", 1) for i in range(host_pages.N_HOSTS)]
    urls = [f"http://{host}/{n}.jpg" for host, times in hosts for n in range(times)]
    status = ["ok", "ok", "ok", "http_404", "http_404"] + ["timeout", "http_404", "ok"] + ["dns"] * host_pages.N_HOSTS
    keys = [f"web-{i}" for i in range(len(urls))]
    rows = {"key": [*keys, "web-0", "web-x"], "url": [*urls, urls[0], None]}
    pq.write_table(pa.table(rows | {"status": [*status, "duplicate_row", "bad_record"]}), tmp_path / "outcomes.parquet")
    pq.write_table(
        pa.table({"key": ["web-0", "web-1", "web-2"], "keep": [True, True, False]}), tmp_path / "verdicts.parquet"
    )
    made = Artifact(tmp_path, Manifest("acquire", "web", "0", 1, {}, {}, "", [], {}, {}, {}))
    page = "\n".join(host_pages.blocks(made, made))
    lines = [line.split("|")[1:-2] for line in page.splitlines() if line.startswith("|")]
    cells = [[html.unescape(c.strip()) for c in line] for line in lines][2:]
    assert cells[0] == ["a.test", "6", "3", "2", "http_404 (2)"]
    assert cells[1][1:] == ["3", "1", "0", "timeout (1)"] and "<b>" not in page
    assert len(cells) == host_pages.N_HOSTS + 1 and cells[-1] == ["2 others", "2", "0", "0", "dns (2)"]


def test_a_source_without_urls_has_no_hosts(recipe: finished.Recipe) -> None:
    found = "\n".join(host_pages.blocks(recipe.made["acquire/toy-pictures"], recipe.made["filter/toy-pictures"]))
    assert "## Hosts" not in found
