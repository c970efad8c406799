"""A mix by SQL: its rows are the lock's, each is checked, and hostile text reads and writes nothing."""

import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import duckdb
import hostile_sql as hostile
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_curate import SEED, job, ledger, lengths, replay, rows, shard

from solo import artifact
from solo.artifact import Artifact
from solo.curate import mix_answer, mix_sql
from solo.curate import part as curate
from solo.curate.exclude import Ledger
from solo.spec import MixSource, SpecError

GOOD = """
WITH ranked AS (  -- the two longest of each label, the longest twice
  SELECT key, source, row_number() OVER (PARTITION BY label ORDER BY n_tokens DESC, md5(key)) AS place FROM eligible
)
SELECT key, source, 3 - place AS n_repeats FROM ranked WHERE place <= 2;
"""


def curated(root: Path, sql: str, shards: dict[str, Artifact], *, workers: int = 1, **mix: object) -> Artifact:
    sources = [{"source": s} | mix.pop(s, {}) for s in shards]
    return artifact.make(job(root, sources, shards, workers=workers, sql=sql, **mix), curate.run)[0]


def toy(root: Path) -> dict[str, Artifact]:
    labels = ["cat", "dog", None] * 4
    a = ledger("a", lengths(12, 0), label=labels, image_sha256=[f"{i:064x}" for i in range(12)])
    b = ledger("b", lengths(6, 1), image_sha256=[f"{i:064x}" for i in range(9, 15)])
    return {"a": shard(root, "a", a), "b": shard(root, "b", b)}


def test_its_rows_are_the_lock_on_any_number_of_threads_and_the_kept_script_gives_them(
    root: Path, tmp_path: Path
) -> None:
    mix = {"a": {"where": {"long": "n_tokens > 9"}}, "unique": ["image_sha256"]}
    shards = toy(root)
    made = curated(root, GOOD, shards, **mix)
    samples = [r for a in shards.values() for f in a.path.glob("shards/*") for r in pq.read_table(f).to_pylist()]
    twins = {f"b-{i:012x}" for i in range(6) if i + 9 < 12 and lengths(12, 0)[i + 9] > 9}
    by_label: dict[object, list[dict]] = {}
    for r in samples:
        if (r["source"] == "b" or r["n_tokens"] > 9) and r["key"] not in twins:
            by_label.setdefault(r.get("label"), []).append(r)
    best = [sorted(found, key=lambda r: -r["n_tokens"]) for found in by_label.values()]
    want = sorted((r["n_tokens"], 2 - i) for found in best for i, r in enumerate(found[:2]))
    assert sorted((r["n_tokens"], r["n_repeats"]) for r in rows(made)) == want
    counts = made.manifest.counts
    assert counts["in"] == 18 == counts["kept"] + sum(counts["dropped"].values()) and counts["dropped"]["not_drawn"] > 0
    assert counts["dropped"]["duplicate_image_sha256"] == len(twins)
    other = curated(tmp_path / "four", GOOD, toy(tmp_path / "four"), workers=4, **mix)
    assert other.manifest.digest == made.manifest.digest
    text = (made.path / "mix.sql").read_text()
    assert "the longest twice" in text and str(root) not in text
    text = text.replace("$excluded", f"'{made.path}/excluded.parquet'").replace("$seed", f"'{SEED}'")
    for name, a in shards.items():
        text = text.replace(f"$files_{name}", f"'{a.path}/shards/*.parquet'")
    assert replay(text) == rows(made)


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("SELECT key, source FROM eligible", r"its columns are \['key', 'source'\]; give key, source and n_repeats"),
        ("SELECT key, source, 1.5 AS n_repeats FROM eligible", "its types are .* whole number"),
        ("SELECT key, source, 'x' AS n_repeats FROM eligible", "its types are .* whole number"),
        ("SELECT key, source, 0 AS n_repeats FROM eligible", r"'a-0{12}' of 'a' has n_repeats outside 1 \.\.\. 1000"),
        ("SELECT key, source, 1::BIGINT << 40 AS n_repeats FROM eligible", "n_repeats: "),
        ("SELECT key, NULL::VARCHAR AS source, 1 AS n_repeats FROM eligible", "is NULL in a column"),
        ("SELECT key, source, 1 AS n_repeats FROM eligible, range(2)", "sample 'a-0{12}' of 'a' is given twice"),
        ("SELECT key || 'x' AS key, source, 1 AS n_repeats FROM eligible", "is in no ledger of the mix"),
        ("SELECT key, 'b' AS source, 1 AS n_repeats FROM eligible WHERE source = 'a'", "is in no ledger of the mix"),
        ("SELECT key, source, 1 AS n_repeats FROM ledger", "cannot be drawn, its reason in `ledger` is not NULL"),
        ("SELECT key, source, 1 AS n_repeats FROM eligible WHERE FALSE", "no sample is drawn from any source"),
        ("SELECT key, source, 1 AS n_repeats FROM verdicts", "no view 'verdicts'; views are ledger and eligible"),
        ("SELECT key, source, 1 AS n_repeats FROM eligible ORDER BY random() LIMIT 3", r"random\(\) gives another"),
        ("SELECT key, source, 1 AS n_repeats FROM eligible WHERE current_date > '2020-01-01'", "gives another answer"),
        ("SELECT key, source, 1 AS n_repeats FROM eligible USING SAMPLE 3", "a sample is another one"),
        ("SELECT key, source, 1 AS n_repeats FROM eligible TABLESAMPLE 30%", "a sample is another one"),
        ("SELECT repeat(key, 99) AS key, source, 1 AS n_repeats FROM eligible", "key of 1386 bytes; at most 1024"),
        ("SELECT key, source, " + "abs(" * 450 + "1" + ")" * 450 + " AS n_repeats FROM eligible", "nested too deep"),
        ("SELECT key, source, approx_count_distinct(key) AS n_repeats FROM eligible GROUP BY ALL", "gives another"),
    ],
)
def test_a_bad_answer_is_named(root: Path, sql: str, says: str) -> None:
    with pytest.raises(SpecError, match=rf"mixes/toy\.yaml: .*{says}") as caught:
        curated(root, sql, toy(root), a={"where": {"long": "n_tokens > 9"}})
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hostile.Ground]:
    folder = tmp_path_factory.mktemp("ground")
    for name in ("out", "in"):
        pq.write_table(pa.table({"a": ["SECRET"]}), folder / f"{name}.parquet")
    (folder / "ledgers").mkdir()
    pq.write_table(ledger("a", [5, 6, 7]), folder / "ledgers" / "0.parquet")
    (folder / "cwd").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "cwd")
        patch.setenv("HOME", str(folder))
        yield hostile.Ground(folder, folder / "ledgers" / "0.parquet")


HOSTILE = (
    *hostile.STATEMENTS,
    *(f"SELECT 'x' AS key, 'a' AS source, 1 AS n_repeats FROM {reader}" for reader in hostile.READERS),
    *(f"SELECT 'x' AS key, 'a' AS source, 1 AS n_repeats FROM {table}" for table in hostile.TABLES),
    "SELECT content AS key, 'a' AS source, 1 AS n_repeats FROM read_text('{secret}')",
    "SELECT (SELECT content FROM read_text('{secret}')) AS key, source, 1 AS n_repeats FROM eligible",
    "WITH eligible AS (FROM read_text('{secret}')) SELECT content AS key, 'a' AS source, 1 AS n_repeats FROM eligible",
    "SELECT getenv('HOME') AS key, source, 1 AS n_repeats FROM eligible",
    "SELECT key, source, 1 AS n_repeats FROM eligible; COPY (SELECT 1) TO 'x.csv'",
    "SELECT key, source, 1 AS n_repeats FROM eligible) TO 'x.csv'; SELECT (1",
)


@pytest.fixture(scope="module")
def con() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as con:
        yield con


def ledger_of(ground: hostile.Ground) -> Ledger:
    files = str(ground.folder / "ledgers" / "*.parquet")
    return Ledger(MixSource(source="a"), files, "CAST(NULL AS VARCHAR)", None, ("key",))  # type: ignore[arg-type]


def run(con: duckdb.DuckDBPyConnection, text: str, ground: hostile.Ground, work: Path) -> None:
    """Ask a text of a ledger of three samples, in a process as curate does."""
    con.execute(f"CREATE OR REPLACE TEMP VIEW samples AS SELECT *, NULL AS reason FROM '{ledger_of(ground).files}'")
    mix_sql.run(con, ground.fill(text), [ledger_of(ground)], None, where="mixes/toy.yaml", work=work)


def test_there_are_enough_of_them() -> None:
    assert len(set(HOSTILE)) >= 150


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_one_line_and_touches_nothing(ground: hostile.Ground, tmp_path: Path, text: str) -> None:
    """Here what the process answers is asked in this one: none of these needs its limits."""
    before = ground.state()
    said = mix_answer.answer(mix_sql.question(ground.fill(text), [ledger_of(ground)], None, tmp_path))
    assert said and "\n" not in said and "SECRET" not in said
    assert ground.state() == before and not any(p.is_file() for p in tmp_path.rglob("*"))


@pytest.mark.parametrize("text", HOSTILE[:: len(HOSTILE) // 5])
def test_so_it_is_in_its_process(
    con: duckdb.DuckDBPyConnection, ground: hostile.Ground, tmp_path: Path, text: str
) -> None:
    before = ground.state()
    with pytest.raises(SpecError) as caught:
        run(con, text, ground, tmp_path)
    said = str(caught.value)
    assert said.startswith("mixes/toy.yaml: sql: ") and "\n" not in said and "SECRET" not in said
    assert ground.state() == before and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", [t for t in HOSTILE[::2] if t.startswith(("SELECT", "SET", "ATTACH")) and ";" not in t]
)
def test_duckdb_alone_lets_nothing_else_be_read(ground: hostile.Ground, tmp_path: Path, text: str) -> None:
    before = ground.state()
    asked = mix_sql.question(ground.fill(text), [ledger_of(ground)], None, tmp_path)
    try:
        mix_answer.write(asked)
        found = pa.ipc.open_stream(asked.answer).read_all().to_pylist()
    except (ValueError, duckdb.Error, OSError) as error:
        found = [str(error)]
    assert "SECRET" not in str(found) and ground.state() == before


@pytest.mark.parametrize(
    "text",
    [
        "WITH RECURSIVE r(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM r) "
        "SELECT 'a' AS key, 'a' AS source, i AS n_repeats FROM r",
        "SELECT key, source, 1 AS n_repeats FROM eligible, range(100000000) x, range(100000000) y WHERE x = y - 5",
        "SELECT md5(i::VARCHAR) AS key, 'a' AS source, count(*) AS n_repeats FROM range(99999999) r(i) GROUP BY ALL",
        "SELECT string_agg(md5(i::VARCHAR), '') AS key, 'a' AS source, 1 AS n_repeats FROM range(99999999) r(i)",
    ],
)
def test_a_bomb_meets_a_cap(
    con: duckdb.DuckDBPyConnection, ground: hostile.Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    for name, cap in {"TIMEOUT_S": 1.5, "MEMORY_BYTES": 64 << 20, "SCRATCH_BYTES": 16 << 20}.items():
        monkeypatch.setattr(mix_sql, name, cap)
    with pytest.raises(SpecError, match=r"mixes/toy\.yaml: sql: (no answer within 1\.5 s|Out of Memory Error)"):
        run(con, text, ground, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("giant", hostile.GIANTS)
def test_a_giant_value_ends_in_its_own_process(
    con: duckdb.DuckDBPyConnection, ground: hostile.Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, giant: str
) -> None:
    for name, cap in {"TIMEOUT_S": 3.0, "MEMORY_BYTES": 64 << 20}.items():
        monkeypatch.setattr(mix_sql, name, cap)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    remedy = "a query of a mix has 64 MiB of memory, 1,024 MiB of them again .*; ask for fewer rows or shorter strings"
    with pytest.raises(SpecError, match=rf"mixes/toy\.yaml: sql: (no answer within 3 s|Out of Memory Error.*{remedy})"):
        run(con, f"SELECT {giant} AS key, source, 1 AS n_repeats FROM eligible", ground, tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < own + (64 << 10)


def test_a_process_that_is_killed_is_told(ground: hostile.Ground, tmp_path: Path) -> None:
    before = psutil.Process().children()  # of other tests of this process

    def kill() -> None:
        while not (found := [p for p in psutil.Process().children() if p not in before]):
            time.sleep(0.01)
        found[0].kill()  # as the kernel does where the machine has less memory than the query may take

    late = threading.Thread(target=kill)
    late.start()
    said = mix_sql.ask(mix_sql.question("SELECT 1", [ledger_of(ground)], None, tmp_path))
    late.join()
    assert said.startswith("its process was ended by SIGKILL; a query of a mix has 4,096 MiB of memory, 1,024 MiB ")
