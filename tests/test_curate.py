"""Curate: hand-written draws, equal bytes whatever the threads, and every ledger row drawn or counted."""

import hashlib
import logging
import multiprocessing
import os
import signal
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from solo import artifact
from solo.artifact import Artifact, Job, Result
from solo.curate import part as curate
from solo.spec import MixSpec, SpecError

SEED = 7


def ledger(source: str, n_tokens: list[int], **extra: list) -> pa.Table:
    n = len(n_tokens)
    columns = {
        "key": [f"{source}-{i:012x}" for i in range(n)],
        "source": [source] * n,
        "shard": [0] * n,
        "offset": [512 * i for i in range(n)],
        "length": [512] * n,
        "n_images": [1] * n,
        "n_patches": [2] * n,
        "n_text_tokens": [t - 2 for t in n_tokens],
        "n_loss_tokens": [t - 3 for t in n_tokens],
        "n_tokens": n_tokens,
        "template": ["plain"] * n,
        "sha256": ["0" * 64] * n,
    }
    return pa.table(columns | extra)


def shard(root: Path, source: str, *tables: pa.Table) -> Artifact:
    """A shard artifact with these ledgers and no tars."""

    def run(job: Job) -> Result:
        (job.out / "shards").mkdir()
        for i, table in enumerate(tables):
            pq.write_table(table, job.out / "shards" / f"{i:05d}.parquet")
        n = sum(t.num_rows for t in tables)
        return Result(n, n, {}, {})

    identity = {"rows": hashlib.sha256(repr([t.to_pydict() for t in tables]).encode()).hexdigest()}
    return artifact.make(Job("shard", source, 1, identity, {}, root, root, 1), run)[0]


def job(root: Path, sources: list[dict], shards: dict[str, Artifact], *, workers: int = 1, **mix) -> Job:
    fields = {"name": "toy", "title": "Toy", "seed": SEED, "sources": sources} | mix
    spec = {"mix": MixSpec.model_validate(fields).model_dump(mode="json")}
    inputs = {f"shard/{name}": made for name, made in shards.items()}
    return Job("curate", "toy", curate.VERSION, spec, inputs, root, root, workers)


def run(root: Path, sources: list[dict], shards: dict[str, Artifact], **options) -> Artifact:
    return artifact.make(job(root, sources, shards, **options), curate.run)[0]


def rows(made: Artifact) -> list[dict]:
    return pq.read_table(made.path / "lock.parquet").to_pylist()


def repeats(made: Artifact, source: str) -> dict[str, int]:
    return {r["key"]: r["n_repeats"] for r in rows(made) if r["source"] == source}


def hash_order(table: pa.Table) -> list[dict]:
    """The contract's order, written without SQL."""
    return sorted(table.to_pylist(), key=lambda r: (hashlib.md5(f"{r['key']}{SEED}".encode()).hexdigest(), r["key"]))


def prefix(table: pa.Table, tokens: int) -> set[str]:
    keys, used = set(), 0
    for row in hash_order(table):
        used += row["n_tokens"]
        if used > tokens:
            break
        keys.add(row["key"])
    return keys


def lengths(n: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(5, 60, n).tolist()


def test_epochs_are_whole_passes_and_a_prefix_in_hash_order(root: Path) -> None:
    table = ledger("a", lengths(100, 0))
    total = sum(table["n_tokens"].to_pylist())
    made = run(root, [{"source": "a", "epochs": 1.84}], {"a": shard(root, "a", table)})
    twice = prefix(table, total * 84 // 100)
    assert repeats(made, "a") == {k: 2 if k in twice else 1 for k in table["key"].to_pylist()}
    assert 0 < len(twice) < 100
    n_tokens = sum(r["n_tokens"] * r["n_repeats"] for r in rows(made))
    assert made.manifest.stats["n_tokens"] == made.manifest.stats["sources"]["a"]["n_tokens"] == n_tokens
    assert made.manifest.stats["sources"]["a"]["epochs"] == pytest.approx(1.84, abs=60 / total)


def test_lock_holds_the_ledger_columns_sorted_by_source_and_key(root: Path) -> None:
    tables = {s: ledger(s, lengths(9, i)) for i, s in enumerate(("b", "a"))}
    shards = {s: shard(root, s, t) for s, t in tables.items()}
    made = run(root, [{"source": "b", "epochs": 1}, {"source": "a", "epochs": 1}], shards)
    want = [
        {name: r[name] for name in curate.LOCK.names[:-1]} | {"n_repeats": 1}
        for s in ("a", "b")
        for r in tables[s].to_pylist()
    ]
    assert rows(made) == want
    written = pq.read_schema(made.path / "lock.parquet")
    assert [(f.name, f.type) for f in written] == [(f.name, f.type) for f in curate.LOCK]


def test_weights_share_the_budget_to_within_one_document(root: Path) -> None:
    tables = {s: ledger(s, lengths(400, i)) for i, s in enumerate("ab")}
    shards = {s: shard(root, s, t) for s, t in tables.items()}
    mix = [{"source": "a", "weight": 0.7}, {"source": "b", "weight": 0.3}]
    made = run(root, mix, shards, budget_tokens=10_000)
    for source, need in (("a", 7_000), ("b", 3_000)):
        have = made.manifest.stats["sources"][source]["n_tokens"]
        longest = max(tables[source]["n_tokens"].to_pylist())
        assert need - longest < have <= need
        assert set(repeats(made, source)) == prefix(tables[source], need)


def test_a_weight_repeats_a_small_source(root: Path) -> None:
    table = ledger("a", [10, 10, 10, 10])
    made = run(root, [{"source": "a", "weight": 1}], {"a": shard(root, "a", table)}, budget_tokens=105)
    assert sorted(repeats(made, "a").values()) == [2, 2, 3, 3]
    assert made.manifest.stats["sources"]["a"] | {"dropped": None} == {
        "n_samples": 4,
        "n_exposures": 10,
        "n_tokens": 100,
        "n_patches": 20,
        "n_text_tokens": 80,
        "n_loss_tokens": 70,
        "n_text_only_tokens": 0,
        "epochs": 2.5,
        "short_tokens": 0,
        "dropped": None,
        "amount": {"unit": "tokens", "asked": 105, "short": 0, "cut": 0},
    }


def test_max_epochs_leaves_a_shortfall_that_is_said(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    mix = [{"source": "a", "weight": 1, "max_epochs": 1.5}]
    with caplog.at_level(logging.WARNING):
        made = run(root, mix, {"a": shard(root, "a", ledger("a", [10, 10, 10, 10]))}, budget_tokens=105)
    assert made.manifest.stats["n_tokens"] == 60
    assert made.manifest.stats["short_tokens"] == made.manifest.stats["sources"]["a"]["short_tokens"] == 45
    assert "mixes/toy.yaml: sources.a" in caplog.text
    assert "45 of 105 tokens are more than max_epochs allows" in caplog.text


@pytest.mark.parametrize(("samples", "want"), [(3, 3), (10, 10), (25, 25)])
def test_samples_count_samples_and_repeat_when_there_are_fewer(root: Path, samples: int, want: int) -> None:
    table = ledger("a", lengths(10, 0))
    made = run(root, [{"source": "a", "samples": samples}], {"a": shard(root, "a", table)})
    order = [r["key"] for r in hash_order(table)]
    whole, rest = divmod(samples, 10)
    assert repeats(made, "a") == {k: n for i, k in enumerate(order) if (n := whole + (i < rest))}
    assert made.manifest.stats["n_exposures"] == want


def test_predicates_drop_by_the_first_that_is_not_true(root: Path) -> None:
    table = ledger("a", [5, 6, 7, 8, 9, 10], label=["x", None, "y", "y", "z", "y"])
    where = {"label": "label <> 'x'", "small": "n_tokens < 10 -- tokens"}
    made = run(root, [{"source": "a", "samples": 2, "where": where}], {"a": shard(root, "a", table)})
    # x is not true, NULL is not true, the last is too long; of the other three, two are drawn.
    assert made.manifest.counts == {"in": 6, "kept": 2, "dropped": {"label": 2, "not_drawn": 1, "small": 1}}
    assert made.manifest.stats["sources"]["a"]["dropped"] == {"label": 2, "small": 1, "not_drawn": 1}


def test_ledgers_of_one_source_may_differ_in_optional_columns(root: Path) -> None:
    one = ledger("a", [5, 6])
    two = ledger("a", [7, 8], label=["x", "y"], key=["a-1", "a-2"])
    mix = [{"source": "a", "epochs": 1, "where": {"label": "label = 'y'"}}]
    made = run(root, mix, {"a": shard(root, "a", one, two)})
    assert list(repeats(made, "a")) == ["a-2"]


@pytest.mark.parametrize("amount", [{"epochs": 1.3}, {"samples": 17}])
def test_adding_a_source_moves_no_row_of_another(root: Path, amount: dict) -> None:
    shards = {s: shard(root, s, ledger(s, lengths(50, i))) for i, s in enumerate("abc")}
    before = run(root, [{"source": "b", **amount}], {"b": shards["b"]})
    after = run(root, [{"source": s, **amount} for s in "cba"], shards)
    assert [r for r in rows(after) if r["source"] == "b"] == rows(before)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 250), st.booleans())
def test_a_draw_is_the_longest_prefix_in_hash_order(
    tmp_path_factory: pytest.TempPathFactory, n_tokens: list[int], percent: int, in_samples: bool
) -> None:
    root, table = tmp_path_factory.mktemp("draw"), ledger("a", n_tokens)
    amount = {"samples": percent} if in_samples else {"epochs": percent / 100}
    if not in_samples and not prefix(table, sum(n_tokens) * percent // 100):
        return  # not one sample: an error, tested below
    made = run(root, [{"source": "a", **amount}], {"a": shard(root, "a", table)})
    order = [r["key"] for r in hash_order(table)]
    if in_samples:
        whole, rest = divmod(percent, len(order))
        want = set(order[:rest])
    else:
        whole, rest = divmod(sum(n_tokens) * percent, 100 * sum(n_tokens))
        want = prefix(table, sum(n_tokens) * percent // 100 - whole * sum(n_tokens))
    assert repeats(made, "a") == {k: n for k in order if (n := whole + (k in want))}


@pytest.mark.parametrize("giant", [False, True])
def test_a_draw_of_many_samples_ends_where_it_should_even_behind_a_giant(root: Path, giant: bool) -> None:
    """Only samples up to a guessed hash are looked at; one that holds most tokens, last of all, defeats the guess."""
    n_tokens = lengths(4_000, 5)
    table = ledger("a", n_tokens)
    if giant:
        last = hash_order(table)[-1]["key"]
        n_tokens[table["key"].to_pylist().index(last)] = 10 * sum(n_tokens)
        table = ledger("a", n_tokens)
    made = run(root, [{"source": "a", "epochs": 0.25}], {"a": shard(root, "a", table)})
    want = prefix(table, sum(n_tokens) // 4)
    assert set(repeats(made, "a")) == want and len(want) == (3_999 if giant else len(want)) > 900


def digests(made: Artifact) -> dict[str, str]:
    return {f["path"]: f["sha256"] for f in made.manifest.files}


def big(root: Path) -> tuple[list[dict], dict[str, Artifact]]:
    shards = {
        s: shard(root, s, *[ledger(s, lengths(6_000, 10 * i + j), key=keys(s, j)) for j in range(3)])
        for i, s in enumerate("ab")
    }
    mix = [{"source": "a", "weight": 0.7, "where": {"short": "n_tokens < 55"}}, {"source": "b", "weight": 0.3}]
    return mix, shards


def keys(source: str, part: int) -> list[str]:
    return [f"{source}-{part}{i:011x}" for i in range(6_000)]


def test_equal_bytes_on_one_and_four_threads_and_twice(root: Path, tmp_path: Path) -> None:
    made = []
    for i, workers in enumerate((1, 4, 4)):
        mix, shards = big(tmp_path / str(i))
        made.append(run(tmp_path / str(i), mix, shards, workers=workers, budget_tokens=270_000))
    assert digests(made[0]) == digests(made[1]) == digests(made[2])
    assert set(digests(made[0])) == {"lock.parquet", "mix.sql"}


def _die_after_first_source(root: Path) -> None:
    mix, shards = big(root)
    wanted = job(root, mix, shards, budget_tokens=270_000)
    object.__setattr__(wanted, "progress", lambda _: os.kill(os.getpid(), signal.SIGKILL))
    artifact.make(wanted, curate.run)


def test_killed_and_run_again_gives_the_same_bytes(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_die_after_first_source, args=(tmp_path / "killed",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list((tmp_path / "killed").glob("curate/toy/*/lock.parquet.tmp"))
    both = [run(tmp_path / name, *big(tmp_path / name), budget_tokens=270_000) for name in ("killed", "whole")]
    assert digests(both[0]) == digests(both[1])


def replay(text: str) -> list[dict]:
    """The rows that the last statement of a lock's script gives, in a DuckDB of its own."""
    con = duckdb.connect()
    *before, last = duckdb.extract_statements(text)
    for statement in before:
        con.execute(statement)
    return con.sql(last.query).to_arrow_table().cast(curate.LOCK).to_pylist()


def test_the_sql_kept_runs_alone_and_gives_the_lock(root: Path) -> None:
    table = ledger("a", lengths(30, 0), label=["it's", "no"] * 15)
    mix = [{"source": "a", "epochs": 0.5, "where": {"o'k": "label = 'it''s'"}}]
    shards = {"a": shard(root, "a", table)}
    made = run(root, mix, shards)
    text = (made.path / "mix.sql").read_text()
    header = dict(line[4:].split(" = ", 1) for line in text.splitlines() if line.startswith("-- $"))
    assert header.pop("files_a").startswith("'shards/*.parquet' of shard/a")
    for name, value in ({"files_a": f"'{shards['a'].path}/shards/*.parquet'"} | header).items():
        text = text.replace(f"${name}", value)
    assert replay(text) == rows(made)
    assert str(root) not in (made.path / "mix.sql").read_text(), "a file of an artifact names no machine path"


@pytest.mark.parametrize(
    ("predicate", "says"),
    [
        ("widht_px > 3", 'Referenced column "widht_px" not found'),
        ("n_tokens >", "syntax error"),
        ("n_tokens", "is INTEGER, not one BOOLEAN"),
        ("CAST(key AS INTEGER) > 0", "Conversion Error"),
        ("max(n_tokens) > 3", "aggregate"),
        ("random() < 0.5", "random() is not a fixed function"),
        ("current_date > DATE '2020-01-01'", "current_date() is not a fixed function"),
        ("row_number() OVER () < 3", "not a fixed function of one sample"),
        ("n_tokens > (SELECT 3)", "a subquery is not a fixed function"),
        ("key IN (SELECT content FROM read_text('/etc/passwd'))", "a subquery"),
        ("true) FROM ledger; DROP TABLE x; SELECT (true", ""),
        ("true, false", ""),
        ("n_tokens > $x", ""),
    ],
)
def test_a_bad_predicate_is_named_with_its_place(root: Path, predicate: str, says: str) -> None:
    table = ledger("a", [5, 6, 7]).set_column(9, "n_tokens", pa.array([5, 6, 7], pa.int32()))
    where = {"fine": "n_tokens > 1", "bad": predicate}
    with pytest.raises(SpecError) as caught:
        run(root, [{"source": "a", "epochs": 1, "where": where}], {"a": shard(root, "a", table)})
    message = str(caught.value)
    assert message.startswith("mixes/toy.yaml: sources.a.where.bad: ")
    assert says in message
    assert "\n" not in message


def test_a_predicate_column_must_be_in_that_sources_ledger(root: Path) -> None:
    shards = {"a": shard(root, "a", ledger("a", [5], label=["x"])), "b": shard(root, "b", ledger("b", [5]))}
    mix = [{"source": s, "epochs": 1, "where": {"label": "label = 'x'"}} for s in "ab"]
    with pytest.raises(SpecError, match=r"mixes/toy.yaml: sources.b.where.label: Binder Error"):
        run(root, mix, shards)


@pytest.mark.parametrize("tables", [(), (ledger("a", []),)])
def test_an_empty_ledger_names_source_and_mix(root: Path, tables: tuple) -> None:
    with pytest.raises(SpecError, match=r"mixes/toy.yaml: sources.a: the ledger of a is empty.*sources/a.yaml"):
        run(root, [{"source": "a", "epochs": 1}], {"a": shard(root, "a", *tables)})


def test_no_sample_left_by_the_predicates(root: Path) -> None:
    mix = [{"source": "a", "epochs": 1, "where": {"long": "n_tokens > 99"}}]
    with pytest.raises(SpecError, match=r"sources.a.where: no sample passes \(long drops 2\); loosen"):
        run(root, mix, {"a": shard(root, "a", ledger("a", [5, 6]))})


def test_weights_that_do_not_add_up_show_the_sum(root: Path) -> None:
    shards = {s: shard(root, s, ledger(s, [5])) for s in "ab"}
    mix = [{"source": "a", "weight": 0.7}, {"source": "b", "weight": 0.2}]
    with pytest.raises(SpecError, match=r"mixes/toy.yaml: sources.weight: 0\.7 \(a\) \+ 0\.2 \(b\) = 0\.9, not 1"):
        run(root, mix, shards, budget_tokens=100)


def test_a_mix_that_draws_nothing_is_an_error(root: Path) -> None:
    with pytest.raises(SpecError, match="no sample is drawn from any source"):
        run(root, [{"source": "a", "weight": 1}], {"a": shard(root, "a", ledger("a", [50]))}, budget_tokens=10)


def test_the_reserved_reason_is_no_predicate_name(root: Path) -> None:
    mix = [{"source": "a", "epochs": 1, "where": {"not_drawn": "true"}}]
    with pytest.raises(SpecError, match="rename the predicate"):
        run(root, mix, {"a": shard(root, "a", ledger("a", [50]))})
