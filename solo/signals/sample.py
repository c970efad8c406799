"""Signals of a record as a whole. Cost: microseconds.

`meta` is measured for every source, listed or not: predicates can name a source's own fields as `meta_*` columns.
"""

from __future__ import annotations

import hashlib
import json
from typing import TypedDict

from solo.filter.pictures import Pictures
from solo.sample import Sample

VERSIONS = {"record": 1, "meta": 1}


class Record(TypedDict):
    """Columns of `record`."""

    n_turns: int
    sample_sha256: str


def record(sample: Sample, pictures: Pictures) -> Record:
    """Messages of any role, and SHA-256 of images and messages together (key and meta left out)."""
    images = [hashlib.sha256(data).hexdigest() for data in sample.images]
    content = json.dumps([images, sample.messages], sort_keys=True, separators=(",", ":"))
    return Record(n_turns=len(sample.messages), sample_sha256=hashlib.sha256(content.encode()).hexdigest())


def meta(sample: Sample, pictures: Pictures) -> dict[str, str]:
    """A string column meta_<name> for every field of the record's meta; anything but a string as JSON."""
    columns: dict[str, str] = {}
    for name, value in sample.meta.items():
        column = f"meta_{name.lower()}"  # SQL names have no case
        if column in columns:
            raise ValueError(f"two meta fields differ from {name!r} in case only; rename one in the adapter")
        if value is not None:
            columns[column] = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return columns
