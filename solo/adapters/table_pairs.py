"""Tables with pictures and question-answer pairs in each row, as The Cauldron: {images, texts: [{user, assistant}]}.

Sample: all pictures of the row first in the first user turn, then user and assistant in turn, one pair after the other.
Key: the row's content, since upstream gives no id. A pair with an empty answer or question rejects its row: half a
conversation would be another record.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from solo.acquire.tables import cell_pictures, rows
from solo.acquire.upstream import by_content, dialogue
from solo.sample import Rejected, Sample


def read(  # noqa: PLR0913 - one argument for each field of the spec
    location: Path,
    *,
    source: str,
    files: Sequence[str] = ("*.parquet",),
    images: str | None = "images",
    pairs: str = "texts",
    question: str = "user",
    answer: str = "assistant",
) -> Iterator[Sample | Rejected]:
    """Rows in order of file and row; `question` and `answer` are fields of each item of column `pairs`."""
    columns = [pairs, *([images] if images else [])]
    for place, row in rows(location, files, columns):
        if isinstance(row, Rejected):
            yield row
            continue
        items, fields = row.get(pairs) or [], (question, answer)
        if not isinstance(items, list):
            yield Rejected(place, "bad_record", f"{pairs} is {type(items).__name__}, not a list")
            continue
        turns = [item.get(f) if isinstance(item, dict) else None for item in items for f in fields]
        if None in turns:
            yield Rejected(place, "bad_record", f"an item of {pairs} has no {fields[turns.index(None) % 2]}")
        elif not turns:
            yield Rejected(place, "empty", f"{pairs} has no question-answer pair")
        else:
            yield _sample(place, cell_pictures(row.get(images), place) if images else [], turns, source)


def _sample(place: str, pictures: list[bytes] | Rejected, turns: list[object], source: str) -> Sample | Rejected:
    if isinstance(pictures, Rejected):
        return pictures
    try:
        messages = dialogue(turns, n_images=len(pictures))
    except ValueError as error:
        return Rejected(place, "bad_record", str(error))
    return by_content(source, pictures, messages, {"id": place})
