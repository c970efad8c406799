"""Fixtures shared by the tests: a data root, and environment variables that keep a test from the user's settings."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _no_user_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SOLO_ROOT", "SOLO_SPECS", "SOLO_WORKERS", "SOLO_RANKS", "SOLO_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"
