"""Tables with pictures and question-answer pairs in each row, as The Cauldron: {images, texts: [{user, assistant}]}.

Sample: all pictures of the row first in the first user turn, then user and assistant in turn, one pair after the other.
Key: the row's content, since upstream gives no id. A pair with an empty answer or question rejects its row: half a
conversation would be another record.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from solo.sample import Rejected, Sample
from solo.tables import cell_pictures, rows
from solo.upstream import by_content, dialogue


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
        turns = _turns(row.get(pairs), question, answer)
        yield turns if isinstance(turns, Rejected) else _sample(place, row.get(images or ""), turns, source, images)


def _turns(pairs: object, question: str, answer: str) -> list[object]:
    items = pairs if isinstance(pairs, list) else []
    return [item.get(name) if isinstance(item, dict) else None for item in items for name in (question, answer)]


def _sample(place: str, cell: object, turns: list[object], source: str, images: str | None) -> Sample | Rejected:
    if not turns:
        return Rejected(place, "empty", "no question-answer pair")
    pictures = cell_pictures(cell, place) if images else []
    if isinstance(pictures, Rejected):
        return pictures
    try:
        messages = dialogue(turns, n_images=len(pictures))
    except ValueError as error:
        return Rejected(place, "bad_record", str(error))
    return by_content(source, pictures, messages, {"id": place})
