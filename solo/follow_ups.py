"""Follow-ups: a second file of conversations about images that another file has introduced, as ALLaVA publishes them.

In: a JSON array of {"image", "conversations"}. Out: the turns about one image. Invariant: the first conversation about
an image counts. Cost: one pass to index, about 200 bytes of memory an image, then a seek and a read for each.
"""

from __future__ import annotations

import json
from pathlib import Path

from solo.upstream import array_items

MARK = "<image>"


class FollowUps:
    """Conversations by image, read from where they lie in their file."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("rb")
        self.places: dict[str, tuple[int, int]] = {}
        for offset, raw in array_items(path):
            if not raw:
                raise ValueError(f"{path}: damaged at byte {offset}; fetch it again")
            record = json.loads(raw)
            if isinstance(record, dict) and isinstance(record.get("image"), str):
                self.places.setdefault(record["image"], (offset, len(raw)))

    def turns(self, image: object) -> list[object]:
        """The turns about this image, its mark taken out: it has been shown already."""
        offset, length = self.places.get(image, (0, 0)) if isinstance(image, str) else (0, 0)
        if not length:
            return []
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
