"""Follow-ups: a second file of conversations about images that another file has introduced, as ALLaVA publishes them.

In: a JSON array of {"image", "conversations"}. Out: the turns about one image, and in the end the records about images
that nobody asked for. Invariant: the first conversation about an image counts. Cost: one pass to index, about 200 bytes
of memory an image, then a seek and a read for each.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

from solo.acquire.upstream import Record, array_items, parse
from solo.sample import Rejected

log = logging.getLogger(__name__)

MARK = "<image>"


class FollowUps:
    """Conversations by image, read from where they lie in their file."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, path.open("rb")
        self.places: dict[str, tuple[int, int]] = {}
        self.asked: set[int] = set()  # by where they lie
        n_odd = 0
        for offset, raw in array_items(path):
            if not raw:
                raise ValueError(f"{path}: damaged at byte {offset}; fetch it again")
            record = parse(raw, path.name)
            if isinstance(record, Rejected) or not isinstance(record.get("image"), str):
                n_odd += 1
            else:
                self.places.setdefault(record["image"], (offset, len(raw)))
        if n_odd:
            log.warning("%s: %d records name no image or are no JSON objects; they follow up on nothing", path, n_odd)

    def turns(self, image: object) -> list[object]:
        """The turns about this image, its mark taken out: it has been shown already."""
        offset, length = self.places.get(image, (0, 0)) if isinstance(image, str) else (0, 0)
        if not length:
            return []
        self.asked.add(offset)
        self.file.seek(offset)
        turns = json.loads(self.file.read(length)).get("conversations")
        if not isinstance(turns, list):
            return []
        return [
            turn | {"value": turn["value"].replace(f"{MARK}\n", "").replace(MARK, "")}
            if isinstance(turn, dict) and isinstance(turn.get("value"), str)
            else turn
            for turn in turns
        ]

    def left(self) -> set[int]:
        """Where conversations lie about whose image nobody has asked."""
        return {offset for offset, _ in self.places.values()} - self.asked

    def alone(self) -> Iterator[tuple[str, Record | Rejected]]:
        """Those conversations as (`file[i]`, record), in order: nobody has shown their image, their mark stays."""
        left = self.left()
        for i, (offset, raw) in enumerate(array_items(self.path)):
            if offset in left:
                yield f"{self.path.name}[{i}]", parse(raw, self.path.name)
