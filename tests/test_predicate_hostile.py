"""What a spec's `keep` and `where` may say is checked before it is bound: nothing is read, written or set by it."""

import re
from collections.abc import Iterator

import duckdb
import hostile_sql as hostile
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from solo import predicate
from solo.spec import SpecError

# Ours, or DuckDB's from before it looks at any table.
BEFORE_BINDING = (
    r"is not a fixed function of one sample|Parser Error|"
    r"Scalar Function with name \S+ does not exist|is a table function but"
)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hostile.Ground]:
    folder = tmp_path_factory.mktemp("ground")
    for name in ("out", "in"):
        pq.write_table(pa.table({"a": ["SECRET"]}), folder / f"{name}.parquet")
    (folder / "cwd").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "cwd")
        patch.setenv("HOME", str(folder))
        yield hostile.Ground(folder, folder / "in.parquet")


@pytest.fixture(scope="module")
def con() -> Iterator[duckdb.DuckDBPyConnection]:
    """With all doors open, as a part that reads and writes files has it: the check alone must hold."""
    with duckdb.connect() as con:
        con.execute("CREATE TABLE t AS SELECT i::INT AS n, 'k' || i AS key FROM range(9) r(i)")
        yield con


@pytest.mark.parametrize("boolean", [True, False])  # False: the classes of a quota
@pytest.mark.parametrize("text", hostile.PREDICATES)
def test_a_hostile_predicate_is_one_line_and_touches_nothing(
    con: duckdb.DuckDBPyConnection, ground: hostile.Ground, text: str, boolean: bool
) -> None:
    before = ground.state()
    with pytest.raises(SpecError) as caught:
        predicate.check(con, con.table("t"), {"bad": ground.fill(text)}, "f.yaml: keep", boolean=boolean)
    said = str(caught.value)
    assert said.startswith("f.yaml: keep.bad: ") and "\n" not in said and "SECRET" not in said
    assert re.search(BEFORE_BINDING, said), "it went as far as the binder, which opens files"
    assert ground.state() == before


def test_there_are_enough_of_them() -> None:
    assert len(set(hostile.PREDICATES)) >= 100


@pytest.mark.parametrize(
    "text",
    [
        "n BETWEEN 1 AND 3 OR n NOT IN (4, 5) OR NOT (key ILIKE '%x_')",
        "CASE WHEN n > 1 THEN key = 'a' ELSE key IS NOT NULL END",
        "regexp_matches(key, '^k[0-9]+$') AND length(key) < 9",
        "list_filter([n, 2], lambda x: x > 1) = [2]",
        "[x + 1 for x in [n] if x > 0] = [2]",
        "try_cast(key AS INT) IS NULL AND n::DOUBLE / 3 > 0.5 AND n % 2 = 0",
        "key COLLATE nocase = 'K1'",
        "coalesce(n, 0) > 1 AND n IS DISTINCT FROM 3",
        "DATE '2020-01-01' + INTERVAL 1 DAY > DATE '2020-01-01'",
        "{'a': n}.a = 1 AND [n][1] = 1 AND key[1] = 'k'",
        "t.n > 1 AND TRUE",
    ],
)
def test_what_people_write_passes(con: duckdb.DuckDBPyConnection, text: str) -> None:
    predicate.check(con, con.table("t"), {"p": text}, "f.yaml: keep")
