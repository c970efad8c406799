"""A followed process: its lines, the bar on a terminal, and stops that wait for it."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from solo.artifact import CHECKOUT
from solo.cli.follow import STOPPED

LINES = "import sys; print('00:00:01 a/x ran'); print('loose [end]', file=sys.stderr); print('00:00:02 b/y reused')"
SAVES = """
import signal, sys, time
def save(*_):
    time.sleep(1)
    print("saved")
    sys.exit(143)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, save)
print("ready")
time.sleep(60)
"""


def command(child: str, nodes: list[str]) -> list[str]:
    code = "import sys; from pathlib import Path; from solo.cli.follow import follow\n"
    code += f"sys.exit(follow([sys.executable, '-c', {child!r}], Path('.'), {nodes!r}))"
    return [sys.executable, "-c", code]


def test_in_a_log_the_lines_are_plain_and_standard_output_is_free() -> None:
    done = subprocess.run(command(LINES, ["a/x"]), cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert sorted(done.stderr.splitlines()) == ["00:00:01 a/x ran", "00:00:02 b/y reused", "loose [end]"]


def test_on_a_terminal_a_bar_counts_artifacts() -> None:
    ours, theirs = pty.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    child = subprocess.Popen(
        command(LINES + "; import time; time.sleep(0.5)", ["a/x", "b/y", "c/z"]), cwd=CHECKOUT, env=env, stderr=theirs
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    assert child.wait() == 0
    assert b"loose [end]" in shown and b"00:00:01 a/x ran" in shown
    assert b"2/3" in shown and b"c/z" in shown


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_passed_on_and_waited_for(number: int, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as out:
        process = subprocess.Popen(
            command(SAVES, []), cwd=CHECKOUT, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    deadline = time.monotonic() + 20
    while "ready\n" not in (tmp_path / "log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(20) == STOPPED
    assert (tmp_path / "log").read_text().split() == ["ready", "saved"]
