"""Tables with one text pair or caption in each row, in columns of their own: WebSight, UltraInteract, any CSV.

Sample: with a `question` template a user turn (pictures, question) and an assistant turn (answer), else one assistant
turn (pictures, answer). A template is text with {column} in it. Key: the row's content.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from solo.acquire.image_files import Names, Pictures
from solo.acquire.tables import cell_pictures, filled, named, rows
from solo.acquire.upstream import Record, by_content
from solo.sample import IMAGE, Message, Rejected, Sample, text


def read(  # noqa: PLR0913 - one argument for each field of the spec
    location: Path,
    *,
    source: str,
    answer: str,
    question: str | None = None,
    image: str | None = None,
    image_files: Names | None = None,
    files: Sequence[str] = ("*.parquet",),
) -> Iterator[Sample | Rejected]:
    """Rows in order; column `image` holds pictures or, where `image_files` names archives or folders, their names."""
    pictures = Pictures(location, image_files) if image_files is not None else None
    columns = dict.fromkeys([*named(question or ""), *named(answer), *([image] if image else [])])
    for place, row in rows(location, files, list(columns)):
        if isinstance(row, Rejected):
            yield row
            continue
        shown: list[bytes] | Rejected = []
        if image and pictures:
            one = pictures.read(row.get(image), place)
            shown = one if isinstance(one, Rejected) else [one]
        elif image:
            shown = cell_pictures(row.get(image), place)
        yield shown if isinstance(shown, Rejected) else _sample(place, row, shown, source, question, answer)


def _sample(
    place: str, row: Record, pictures: list[bytes], source: str, question: str | None, answer: str
) -> Sample | Rejected:
    said, images = filled(answer, row), [IMAGE for _ in pictures]
    if not said.strip():
        return Rejected(place, "empty", "the answer is empty")
    messages: tuple[Message, ...] = ({"role": "assistant", "content": [*images, text(said)]},)
    if question is not None:
        asked = filled(question, row)
        if not asked.strip():
            return Rejected(place, "bad_record", "the question is empty")
        messages = (
            {"role": "user", "content": [*images, text(asked)]},
            {"role": "assistant", "content": [text(said)]},
        )
    return by_content(source, pictures, messages, {"id": place})
