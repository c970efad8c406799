"""solo sql: the views tell what the artifacts hold, and nothing else can be read or changed."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

import duckdb
import hostile_sql as hostile
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from solo import artifact, sql
from solo.artifact import Job, Result
from solo.cli import app as cli
from solo.cli import sql_shell
from solo.curate import query

LOCK = {"key": ["a-1", "a-2"], "source": ["a", "a"], "n_tokens": [5, 7], "n_repeats": [2, 1]}


def make(root: Path, part: str, name: str, *, spec: int = 0, stats: dict | None = None, **files: dict) -> Path:
    """An artifact with these tables; `a__b` is a/b.parquet."""

    def run(job: Job) -> Result:
        for file, columns in files.items():
            path = job.out / f"{file.replace('__', '/')}.parquet"
            path.parent.mkdir(exist_ok=True)
            pq.write_table(pa.table(columns), path)
        return Result(1, 1, {}, stats or {})

    return artifact.make(Job(part, name, 1, {"spec": spec}, {}, root, root, 1), run)[0].path


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hostile.Ground]:
    folder = tmp_path_factory.mktemp("ground [1]")
    root = folder / "root"
    make(root, "filter", "cc", verdicts={"key": ["k1", "k2"], "keep": [True, False], "reason": [None, "small"]})
    make(root, "curate", "mix", spec=0, lock=LOCK | {"n_repeats": [9, 9]})
    make(root, "curate", "mix", spec=1, lock=LOCK)
    make(root, "shard", "a", shards__00000={"key": ["a-1"]}, shards__00001={"key": ["a-2"], "meta_label": ["x"]})
    make(root, "shard", "b", shards__00000={"key": ["b-1"], "language": ["en"]})
    make(root, "acquire", "none")
    own = {"n_questions": 4, "score": 0.75, "blind": 0.25}
    stats = own | {"chance": 0.5, "protocol": "p", "checkpoint_digest": "c", "by_category": {"easy": own}}
    make(root, "evaluate", "digits", stats=stats)
    inside = next(root.glob("filter/cc/*/verdicts.parquet"))
    pq.write_table(pa.table({"a": ["SECRET"]}), folder / "out.parquet")
    (folder / "cwd").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "cwd")
        patch.setenv("HOME", str(folder))
        yield hostile.Ground(folder, inside)


@pytest.fixture(scope="module")
def session(ground: hostile.Ground) -> Iterator[sql.Session]:
    with sql.session(ground.folder / "root") as opened:
        yield opened


def ask(session: sql.Session, text: str) -> list[dict]:
    answer = session.ask(text)
    return [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]


def test_rows_name_their_artifact_and_the_newest_one_counts(session: sql.Session) -> None:
    rows = ask(session, "SELECT * FROM locks ORDER BY key")
    assert [(r["artifact"], r["name"], r["key"], r["n_repeats"]) for r in rows] == [
        ("curate/mix", "mix", "a-1", 2),
        ("curate/mix", "mix", "a-2", 1),
    ]
    assert len({r["fingerprint"] for r in rows}) == 1
    (old_and_new,) = ask(session, "SELECT count(DISTINCT fingerprint) AS n, sum(n_repeats) AS r FROM locks_all")
    assert old_and_new == {"n": 2, "r": 21}


def test_columns_that_only_some_shards_have(session: sql.Session) -> None:
    rows = ask(session, "SELECT name, key, meta_label, language, n_tokens FROM ledger ORDER BY key")
    assert [tuple(r.values()) for r in rows] == [
        ("a", "a-1", None, None, None),
        ("a", "a-2", "x", None, None),
        ("b", "b-1", None, "en", None),
    ]


@pytest.mark.parametrize("view", [n + a for n in (*sql.VIEWS, "views") for a in ("", "_all") if n + a != "views_all"])
def test_every_view_opens_with_its_columns_even_without_artifacts(session: sql.Session, view: str) -> None:
    named = {"artifact", "name", "fingerprint"} if view != "views" else {"view", "part", "holds"}
    assert named <= set(session.ask(f"SELECT * FROM {view} LIMIT 1").columns)


def test_scores_come_from_manifests(session: sql.Session) -> None:
    rows = ask(session, "SELECT name, category, score, chance FROM scores ORDER BY category")
    assert [tuple(r.values()) for r in rows] == [("digits", "", 0.75, 0.5), ("digits", "easy", 0.75, 0.5)]


@pytest.mark.parametrize(
    "text",
    [
        "WITH RECURSIVE r AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM r WHERE n < 3) SELECT sum(n) FROM r",
        "SELECT l.key FROM locks AS l JOIN ledger USING (key) WHERE l.key IN (SELECT key FROM Locks)",
        "FROM locks SELECT key, row_number() OVER (ORDER BY key) QUALIFY TRUE LIMIT 1",
        "SELECT * FROM (VALUES (1), (2)) AS v(a), range(3), unnest([1, 2]) EXCEPT SELECT 1, 2, 3",
        "PIVOT locks ON source IN ('a') USING sum(n_tokens)",
    ],
)
def test_queries_people_write_are_answered(session: sql.Session, text: str) -> None:
    assert session.ask(text).rows


HOSTILE = (
    *(f"SELECT * FROM {reader}" for reader in hostile.READERS),
    *(f"SELECT * FROM {table}" for table in hostile.TABLES),
    *hostile.STATEMENTS,
)


def test_there_are_enough_of_them() -> None:
    assert len(set(HOSTILE)) >= 150


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_statement_is_one_line_and_touches_nothing(
    session: sql.Session, ground: hostile.Ground, text: str
) -> None:
    before = ground.state()
    with pytest.raises(query.QueryError) as caught:
        session.ask(ground.fill(text))
    said = str(caught.value)
    assert said.startswith("sql: ") and "\n" not in said and "SECRET" not in said
    assert ground.state() == before


@pytest.mark.parametrize("reader", [r for r in hostile.READERS if "{secret}" in r or "{outside}" in r or "/" in r])
def test_without_the_parse_duckdb_itself_reads_no_other_file(
    session: sql.Session, ground: hostile.Ground, reader: str
) -> None:
    """The second lock: what slips through the first one still opens no file but those of the views."""
    inside = ground.words["inside"]
    for text in (f"SELECT * FROM {reader}", f"CREATE OR REPLACE TEMP TABLE t AS FROM {reader}"):
        try:
            rows = session._con.execute(ground.fill(text)).fetchall()
        except duckdb.Error as error:
            assert "SECRET" not in str(error)
        else:
            assert rows in ([], [(0,)]) or inside in ground.fill(reader), rows


def test_settings_are_final(session: sql.Session) -> None:
    for text in ("SET enable_external_access = TRUE", "SET allowed_paths = []", "SET memory_limit = '1TB'"):
        with pytest.raises(duckdb.Error, match=r"locked|disabled"):
            session._con.execute(text)
    with pytest.raises(duckdb.Error):
        session._con.execute("INSTALL httpfs")


def test_memory_is_capped(ground: hostile.Ground) -> None:
    with sql.session(ground.folder / "root", memory_bytes=32 << 20) as small:
        small.ask("SELECT count(*) FROM locks")
        with pytest.raises(query.QueryError, match="Out of Memory") as caught:
            small.ask("SELECT list(i) FROM range(20_000_000) AS r(i)")
        assert "\n" not in str(caught.value)


def test_a_damaged_artifact_is_left_out_and_named(tmp_path: Path) -> None:
    whole = make(tmp_path, "curate", "b", lock=LOCK)
    (make(tmp_path, "curate", "a", lock=LOCK) / "lock.parquet").unlink()
    with sql.session(tmp_path) as opened:
        assert [r["fingerprint"] for r in ask(opened, "SELECT DISTINCT fingerprint FROM locks")] == [whole.name]
        assert len(opened.damaged) == 1 and opened.damaged[0].endswith("lock.parquet is missing")


def test_scratch_is_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql.tempfile, "tempdir", str(tmp_path))
    with sql.session(tmp_path / "root"):
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_json_csv_and_table(ground: hostile.Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLO_ROOT", str(ground.folder / "root"))
    run = CliRunner()
    query = "SELECT key, n_tokens, [n_tokens] AS l, 'nan'::DOUBLE AS x, DATE '2020-01-02' AS d FROM locks ORDER BY key"
    found = json.loads(run.invoke(cli.app, ["sql", query, "--json"]).stdout)
    assert found[0] == {"key": "a-1", "n_tokens": 5, "l": [5], "x": None, "d": "2020-01-02"}
    rows = list(csv.DictReader(io.StringIO(run.invoke(cli.app, ["sql", "--csv"], input=query).stdout)))
    assert [(r["key"], r["n_tokens"], r["l"]) for r in rows] == [("a-1", "5", "[5]"), ("a-2", "7", "[7]")]
    assert "(2 rows)" in run.invoke(cli.app, ["sql", query]).stdout


def test_a_terminal_gets_no_escapes_from_the_data(session: sql.Session) -> None:
    shown = sql_shell.written(session.ask("SELECT chr(27) || '[2J' || chr(10) || 'x' AS a"), "table")
    assert "\x1b" not in shown and len(shown.splitlines()) == 3


def test_typed_queries_end_with_a_semicolon_outside_quotes(session: sql.Session) -> None:
    lines = iter(["SELECT ';' AS a, -- ; not here", "2 AS b;", "SELEC 1; SELECT 3 AS c;"])
    said: list[str] = []

    def read(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    sql_shell.converse(session, said.append, read)
    assert said[0].startswith("views: ") and len(said) == 4
    assert said[1].startswith("a  b") and said[2].startswith("error: sql: ") and said[3].startswith("c")
