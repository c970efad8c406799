"""What a user meets: the table, the JSON documents, and one line for each mistake."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import ONE, Driver, clean_env

from solo.artifact import CHECKOUT
from solo.line import PARTS
from solo.report import closing

Env = dict[str, str]


def solo(*arguments: str, env: Env) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "solo.cli", *arguments]
    return subprocess.run(command, cwd=CHECKOUT, env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny.write_specs(tmp_path / "specs")
    return tmp_path


def env_of(base: Path, home: Path | None = None) -> Env:
    where = {"SOLO_ROOT": str(base / "root"), "SOLO_SPECS": str(base / "specs")}
    return clean_env(home or base / "home") | where | ONE


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The only line on standard error, where a mistake is told."""
    assert done.returncode != 0
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


# What is wrong in a spec, an option or the environment is known before a server starts.
BEFORE: dict[str, tuple[dict[str, Any], list[str], Env, str]] = {
    "unknown key": (
        {"file": "sources/toy-text.yaml", "licens": "x"},
        ["plan", "toy"],
        {},
        r"unknown key 'licens'.*licen",
    ),
    "unpinned revision": (
        {"file": "sources/toy-text.yaml", "revision": "main"},
        ["plan", "toy"],
        {},
        r"revision: .*'main' is not pinned; use",
    ),
    "unknown recipe": ({}, ["plan", "tiy"], {}, r"tiy\.yaml: no such file; .* has \['toy'\]"),
    "unknown recipe, run": ({}, ["run", "tiy"], {}, r"no such file; .* has \['toy'\]"),
    "recipe never run": ({}, ["report", "toy"], {}, r"no finished run of recipe 'toy'.*`solo run toy` first"),
    "until": ({}, ["plan", "toy", "--until", "trian"], {}, r"until is 'trian'; choose one of acquire, .*train"),
    "only": ({}, ["run", "toy", "--only", "trian"], {}, r"only is 'trian'; choose one of acquire, .*train"),
    "force": ({}, ["run", "toy", "--force", "trian"], {}, r"force is 'trian'; choose one of acquire, .*train"),
    "no workers": (
        {},
        ["plan", "toy"],
        {"SOLO_WORKERS": "0"},
        r"SOLO_WORKERS is '0'; give a whole number .* 1 or more",
    ),
    "port": ({}, ["up"], {"SOLO_PORT": "123456"}, r"SOLO_PORT is '123456', not a port number; give one"),
}


@pytest.mark.parametrize("case", BEFORE)
def test_a_mistake_is_one_line_before_anything_starts(case: str, base: Path) -> None:
    change, arguments, extra, says = BEFORE[case]
    if change:
        tiny.edit(base / "specs", **change)
    done = solo(*arguments, env=env_of(base) | extra)
    assert re.search(says, one_line(done)), done.stderr
    assert not (base / "root").exists()


def test_a_taken_port_is_one_line(base: Path, server: Env) -> None:
    done = solo("up", env=env_of(base) | {"SOLO_PORT": server["PREFECT_SERVER_API_PORT"]})
    assert re.search(r"SOLO_PORT=\d+ is in use by another program; give another", one_line(done))


def no_data(base: Path) -> Env:
    (base / "specs" / "data" / "text").rename(base / "specs" / "data" / "elsewhere")
    return {}


def other_data(base: Path) -> Env:
    tiny.edit(base / "specs", "sources/toy-text.yaml", revision="sha256:" + "1" * 64)
    return {}


def no_img2dataset(base: Path) -> Env:
    (base / "specs" / "data" / "urls.csv").write_text("url,caption\nhttp://images.sample.test/a.png,a cat\n")
    args = {"url_column": "url", "caption_column": "caption", "extra_columns": [], "timeout_s": 5, "max_side_px": 64}
    args["user_agent"] = "toybot/1 (+https://example.org/bot)"
    acquire = {"location": "data/urls.csv", "adapter": "url_list.download", "args": args, "samples_per_shard": 5}
    tiny.edit(base / "specs", "sources/toy-text.yaml", acquire=acquire)
    tiny.edit(base / "specs", "sources/toy-text.yaml", revision="0" * 40)
    return {"SOLO_IMG2DATASET": "/nonexistent"}


def no_tokenizer(base: Path) -> Env:
    tiny.edit(base / "specs", "recipes/toy.yaml", tokens__tokenizer=str(base / "nowhere.model"))
    return {}


def lone_rank_batch(base: Path) -> Env:
    return {"SOLO_RANKS": "two"}


# What only a part can see is told by the run it fails.
INSIDE = {
    "missing data": (no_data, "acquire", r"acquire/toy-text: .*/data/text does not exist; fetch the source there"),
    "wrong revision": (other_data, "acquire", r"acquire/toy-text: .*but revision is sha256:1111.*; fetch the pinned"),
    "no img2dataset": (
        no_img2dataset,
        "acquire",
        r"acquire/toy-text: .*no environment at /nonexistent; run `make setup`",
    ),
    "no tokenizer": (no_tokenizer, "shard", r"shard/toy-pictures: .*nowhere\.model.*; "),
    "ranks": (lone_rank_batch, "train", r"train/toy-stage: SOLO_RANKS: 'two' is not a number of processes; set"),
}


@pytest.mark.parametrize("case", INSIDE)
def test_a_mistake_a_part_finds_is_its_runs_message(case: str, base: Path, driver: Driver) -> None:
    change, until, says = INSIDE[case]
    ended = driver.run(base, extra=change(base), until=until)
    assert not ended["completed"]
    assert re.match(says, ended["message"]) and "\n" not in ended["message"]


def test_a_failed_run_ends_with_its_message(base: Path, server: Env) -> None:
    other_data(base)
    done = solo("run", "toy", "--json", env=env_of(base, Path(server["SOLO_PREFECT_HOME"])))
    assert done.returncode == 1 and done.stdout == ""
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert re.match("error: " + INSIDE["wrong revision"][2], last), done.stderr


def test_json_documents(base: Path, server: Env) -> None:
    env = env_of(base, Path(server["SOLO_PREFECT_HOME"]))
    before = json.loads(solo("plan", "toy", "--json", env=env).stdout)
    check_plan(before, {"run", "unknown"})

    done = solo("run", "toy", "--json", env=env)
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert said[0].startswith("Prefect UI: http://127.0.0.1:")
    for node in ("acquire/toy-text", "train/toy-stage", "report/toy"):
        assert any(re.match(rf"\d\d:\d\d:\d\d {node} ran", text) for text in said), done.stderr
    assert not [text for text in said if re.search(r"Beginning|Finished in state|View at|Traceback|Warning", text)]
    report = json.loads(done.stdout)
    check_report(report)

    assert json.loads(solo("report", "toy", "--json", env=env).stdout) == report
    check_plan(json.loads(solo("plan", "toy", "--json", env=env).stdout), {"reuse"})

    for columns in (80, 120):
        shown = solo("report", "toy", env=env | {"COLUMNS": str(columns)}).stdout.split("\n\n")
        table = shown[0].splitlines()
        assert len(table) == 2 + len(before["parts"])
        for p in before["parts"]:
            assert any(f" {p['name']} " in row for row in table), p["name"]
        assert max(map(len, table)) <= columns
        assert shown[1].startswith("dropped, by reason\n") and "not_drawn" not in shown[1]
        assert shown[2].startswith("ledger closes: yes\ntoy-colours: score ")


def check_plan(plan: dict[str, Any], actions: set[str]) -> None:
    assert set(plan) >= {"recipe", "parts"} and plan["recipe"] == "toy"
    assert {p["part"] for p in plan["parts"]} == set(PARTS)
    assert {p["action"] for p in plan["parts"]} == actions
    for p in plan["parts"]:
        assert all(isinstance(p[key], str) and p[key] for key in ("part", "name", "action", "because"))


def check_report(report: dict[str, Any]) -> None:
    assert report["recipe"] == "toy" and report["closes"] is True
    assert {p["part"] for p in report["parts"]} == set(PARTS) - {"report"}
    for p in report["parts"]:
        assert set(p) >= {"part", "name", "in", "kept", "dropped", "seconds"}
        assert p["in"] == p["kept"] + sum(p["dropped"].values())
        assert isinstance(p["seconds"], float)
    (stage,) = report["stages"]
    assert set(stage) >= {"name", "packs", "steps", "tokens", "loss_first", "loss_last"}
    (score,) = report["scores"]
    assert score["benchmark"] == "toy-colours"
    assert all(0 <= score[key] <= 1 for key in ("score", "chance", "blind"))


def row(part: str, name: str, n: int, state: str = "ran", **dropped: int) -> dict[str, Any]:
    kept = n - sum(dropped.values())
    return {"part": part, "name": name, "state": state, "in": n, "kept": kept, "dropped": dropped} | {
        "tokens": n * 1_000 if part == "train" else "",
        "seconds": 1234.5,
    }


def test_the_closing_table_never_cuts_a_name() -> None:
    rows = [
        row("acquire", "laion-coco-recaptioned-part-1", 12_345_678_901, http_404=1_234_567_890, timeout=5),
        row("acquire", "b", 12, state="reused"),
        row("train", "stage-1", 987_654),
    ]
    assert closing.table(rows, 200) == closing.table(rows, 120)
    wide, narrow = closing.table(rows, 120), closing.table(rows, 80)
    sums = ["12,345,678,901", "11,111,111,006", "1,234,567,895"]
    assert wide[1].split() == ["acquire", rows[0]["name"], "ran", *sums, "1,234.5"]
    assert narrow[1].split() == ["acquire", rows[0]["name"], "ran", "12.3G", "11.1G", "1.23G", "1,234.5"]
    assert narrow[2].split() == ["b", "reused", "12", "12", "0"]  # its part stands above, and it took no time
    assert narrow[3].split() == ["train", "stage-1", "ran", "988k", "988k", "0", "988M", "1,234.5"]
    assert max(map(len, narrow)) <= 80 < max(map(len, wide)) <= 120
    for text in wide[1:]:
        assert text.startswith(("acquire  ", "train    ", "         "))


def test_dropped_is_largest_first_and_whole() -> None:
    rows = [row("filter", "a", 50, small=2), row("filter", "b", 50), row("filter", "c", 50, dark=1, small=9, odd=0)]
    assert closing.dropped(rows, 80) == ["filter/c  10  small 9, dark 1", "filter/a   2  small 2"]
    assert closing.dropped(rows, 24) == ["filter/c  10  small 9,", "              dark 1", "filter/a   2  small 2"]
    assert closing.dropped(rows[1:2], 80) == []


PYTHON_39 = """#!/bin/sh
[ "$1" = -c ] && exec {python} -c "import sys; sys.version_info = (3, 9, 1); exec(sys.argv[1])" "$2"
touch {touched}
"""


@pytest.mark.parametrize("python", ["old", "absent"])
def test_make_refuses_another_python_before_it_installs(python: str, tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "infra"):
        (tmp_path / name).symlink_to(CHECKOUT / name)
    fake, touched = tmp_path / "python3.9", tmp_path / "touched"
    if python == "old":
        fake.write_text(PYTHON_39.format(python=sys.executable, touched=touched))
        fake.chmod(0o755)
    done = subprocess.run(
        ["make", "--no-print-directory", "setup", f"PYTHON={fake}"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    fact = f"{fake} is 3.9" if python == "old" else f"{fake} does not run"
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.splitlines()[0] == f"error: Python 3.11 or 3.12 is needed, {fact}; use make PYTHON=python3.11"
    assert not touched.exists() and not (tmp_path / ".venv").exists()
