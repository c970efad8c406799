"""The rules of the tree that a machine can check: imports, folders, file sizes, names, ASCII."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*ROOT.glob("solo/**/*.py"), *ROOT.glob("flows/*.py")])
PARTS = ("acquire", "filter", "shard", "curate", "pack", "train", "evaluate", "report")
TOP = {
    "pyproject.toml",
    "flows",
    "solo",
    "datasets_spec",
    "tests",
    "infra",
    "README.md",
    "Makefile",
    "LICENSE",
}
HEAVY = {"torch", "duckdb", "PIL", "webdataset", "transformers", "deepspeed"}


def imported(path: Path, *, top_level: bool) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_point_one_way(path: Path) -> None:
    if path.is_relative_to(ROOT / "solo"):
        assert not imported(path, top_level=False) & {"prefect", "flows"}
    else:
        assert not imported(path, top_level=True) & HEAVY


@pytest.mark.parametrize("part", PARTS)
def test_each_part_has_its_module_flow_and_test(part: str) -> None:
    for path in (f"solo/{part}/part.py", f"flows/{part}.py", f"tests/test_{part}.py"):
        assert (ROOT / path).is_file(), path


def test_files_are_short() -> None:
    long = {p: n for p in SOURCES if (n := len(p.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long


def test_no_drawer_modules() -> None:
    assert not {p.stem for p in SOURCES} & {"utils", "helpers", "common", "misc", "base"}


def test_top_level_is_the_agreed_one() -> None:
    seen = {p.name for p in ROOT.iterdir() if not p.name.startswith(".") and not p.name.endswith(".egg-info")}
    assert seen <= TOP, seen - TOP


def test_code_is_ascii() -> None:
    for path in SOURCES:
        assert path.read_bytes().isascii(), path


def test_import_rule_would_catch_a_breach(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from prefect import flow\n")
    assert imported(bad, top_level=False) == {"prefect"}
    assert imported(bad, top_level=True) == set()
