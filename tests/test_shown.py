"""shown: pages of earlier runs that hold what is listed go from a real server's database, and no others."""

import json
import os
import subprocess
import sys
from pathlib import Path

from test_server import Second
from test_takedown import listed

from solo.artifact import CHECKOUT
from solo.lineage import shown
from solo.lineage.holders import Held
from solo.lineage.takedown import Listed
from solo.report.markdown import escape

URL = "https://host1.example/page/1?q=a&b"
PICTURE = "![kept](data:image/jpeg;base64,AAAA)"
PAGES = {  # key -> type, text, whether it must go
    "t-acquire": ("markdown", f"what failed: {escape(URL)}", True),
    "t-acquire-table": ("table", json.dumps([{"url": URL}]), True),
    "t-filter-toy-web": ("markdown", PICTURE, True),
    "t-filter": ("markdown", f"## Samples of toy-web\n\n{PICTURE}", True),
    "t-filter-toy-text": ("markdown", f"## Samples of toy-web-2\n\n{PICTURE}", False),
    "t-shard": ("markdown", "toy-web: 12 samples", False),
}


def takedown(env: dict[str, str], root: Path, specs: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "solo.cli", "takedown", *options]
    env = env | {"SOLO_ROOT": str(root), "SOLO_SPECS": str(specs), "SOLO_WORKERS": "1"}
    return subprocess.run(command, env=env, cwd=CHECKOUT, capture_output=True, text=True, check=False)


def test_pages_that_hold_what_is_listed_go_and_no_others(server: dict[str, str], tmp_path: Path) -> None:
    api = Second(tmp_path, tmp_path, server).api
    specs, root = listed(tmp_path / "specs", f"url,{URL}"), tmp_path / "root"
    ids = {}
    for key, (kind, text, _) in PAGES.items():
        ids[key] = api("artifacts/", {"key": key, "type": kind, "data": text})["id"]
    (entry,) = Listed.of(specs).entries
    shown.note(root, [Held(entry.id, "filter/toy-web/0123abcd", "verdicts.parquet")])  # and that is gone since
    again = api("artifacts/", {"key": "t-filter-toy-web", "type": "markdown", "data": PICTURE})["id"]
    ended = takedown(server, root, specs, "--apply", "--prove", "--json")
    assert ended.returncode == 0, ended.stderr
    said = json.loads(ended.stdout)
    assert said["clean"] and said["pages"] == [] and said["pages_unsearched"] == ""
    gone = {key for key, (_, _, goes) in PAGES.items() if goes}
    assert {line for line in ended.stderr.splitlines() if line.startswith("page ")} == {
        f"page {key} {ids[key]}: removed" for key in gone
    }
    left = {a["id"] for a in api("artifacts/filter", {"artifacts": {"key": {"any_": list(PAGES)}}})}
    assert left == {ids[key] for key in PAGES.keys() - gone} | {again}


def test_a_server_that_is_down_is_told_and_one_that_never_was_is_not(tmp_path: Path) -> None:
    specs, home = listed(tmp_path / "specs", f"url,{URL}"), tmp_path / "prefect"
    env = os.environ | {"SOLO_PREFECT_HOME": str(home)}
    assert "searched" not in takedown(env, tmp_path / "root", specs).stdout
    home.mkdir()
    (home / "prefect.db").touch()
    says = f"NOT searched: no Prefect server runs for {home}; `solo up` starts it; then run this again"
    assert says in takedown(env, tmp_path / "root", specs).stdout
