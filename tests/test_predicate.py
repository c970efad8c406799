"""Predicate: fixed functions of one sample pass, everything else is named before a row or a file is read."""

from collections.abc import Iterator
from pathlib import Path

import duckdb
import pytest

from solo import predicate
from solo.spec import SpecError


@pytest.fixture
def con() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as con:
        con.execute("CREATE TABLE t AS SELECT i::INT AS n, 'k' || i AS key, i % 3 = 0 AS fit FROM range(9) r(i)")
        yield con


@pytest.mark.parametrize(
    "text", ["n > 3", "fit", "fit AND key LIKE 'k%'", "n IN (1, 2) -- two", "list_sum([n, 2]) > 3", "NULL::BOOLEAN"]
)
def test_a_fixed_function_of_one_sample_passes(con: duckdb.DuckDBPyConnection, text: str) -> None:
    predicate.check(con, con.table("t"), {"p": text}, "f.yaml: keep")
    assert predicate.failing(con.table("t"), {"p": text}) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("m > 3", r"Binder Error: .*; columns are \['n', 'key', 'fit'\]"),
        ("n", "'n' is INTEGER, not one BOOLEAN; write a comparison"),
        ("sum(n) > 3", "aggregate"),
        ("lag(n) OVER (ORDER BY n) > 3", "a window is not a fixed function of one sample"),
        ("EXISTS (SELECT 1)", "a subquery is not"),
        ("RANDOM() < 0.5", r"random\(\) is not"),
        ("now() > TIMESTAMP '2020-01-01'", r"now\(\) is not"),
        ("CASE WHEN n > 1 THEN uuid() = 'x' ELSE fit END", r"uuid\(\) is not"),
        ("n > 1; SELECT true", "Parser Error"),
    ],
)
def test_anything_else_is_named(con: duckdb.DuckDBPyConnection, text: str, says: str) -> None:
    with pytest.raises(SpecError, match=rf"^f\.yaml: keep\.bad: .*{says}") as caught:
        predicate.check(con, con.table("t"), {"good": "fit", "bad": text}, "f.yaml: keep")
    assert "\n" not in str(caught.value)


def test_no_file_is_opened(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    text = f"n IN (SELECT 1 FROM read_csv('{tmp_path / 'absent.csv'}'))"
    with pytest.raises(duckdb.IOException):
        con.table("t").filter(text)  # the guard: binding alone does open it
    with pytest.raises(SpecError, match="a subquery is not a fixed function"):
        predicate.check(con, con.table("t"), {"bad": text}, "f.yaml: keep")


def test_a_column_may_have_the_name_of_a_function(con: duckdb.DuckDBPyConnection) -> None:
    con.execute("CREATE TABLE u AS SELECT 3 AS now")
    predicate.check(con, con.table("u"), {"p": "now > 1"}, "f.yaml: keep")


def test_what_fails_on_rows_is_named(con: duckdb.DuckDBPyConnection) -> None:
    found = predicate.failing(con.table("t"), {"good": "fit", "bad": "key::INT > 3"})
    assert found is not None
    assert found.startswith("bad: Conversion Error: ")
    assert found.endswith("try_cast gives NULL")
