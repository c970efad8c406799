"""Plug-ins by dotted name: `image.size` of folder `signals` is `solo/signals/image.py:size`. Grep is the registry."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from solo.spec import SpecError


def resolve(folder: str, dotted: str) -> Callable[..., Any]:
    """The function a spec names; a typo is a SpecError that lists what exists."""
    module_name, _, function_name = dotted.rpartition(".")
    home = Path(__file__).parent / folder
    modules = sorted(p.stem for p in home.glob("*.py") if p.stem != "__init__")
    if module_name not in modules:
        raise SpecError(f"{dotted!r}: no module {module_name!r} in solo/{folder}; it has {modules}")
    module = importlib.import_module(f"solo.{folder}.{module_name}")
    public = {
        name: f
        for name, f in inspect.getmembers(module, inspect.isfunction)
        if not name.startswith("_") and f.__module__ == module.__name__
    }
    if function_name not in public:
        raise SpecError(f"{dotted!r} is not in solo/{folder}/{module_name}.py; it has {sorted(public)}")
    return public[function_name]
