"""Tables with a conversation in each row: a column of [{role, content}], as UltraChat-200K and CodeAct.

Sample: the turns as they are, roles mapped to system, user and assistant; pictures of an `images` column come first in
the first user turn. Key: the row's content. Turns must alternate from user to assistant after at most one system turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from solo.acquire.tables import cell_pictures, rows
from solo.acquire.upstream import by_content, dialogue
from solo.sample import Message, Rejected, Sample, text

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}


def read(  # noqa: PLR0913 - one argument for each field of the spec
    location: Path,
    *,
    source: str,
    files: Sequence[str] = ("*.parquet",),
    messages: str = "messages",
    role: str = "role",
    content: str = "content",
    roles: Mapping[str, str] = ROLES,
    images: str | None = None,
) -> Iterator[Sample | Rejected]:
    """Rows in order of file and row."""
    for place, row in rows(location, files, [messages, *([images] if images else [])]):
        if isinstance(row, Rejected):
            yield row
            continue
        turns = row.get(messages)
        items = turns if isinstance(turns, list) else [None]
        said = [(roles.get(str(t.get(role))), t.get(content)) if isinstance(t, dict) else (None, None) for t in items]
        pictures = cell_pictures(row.get(images), place) if images else []
        yield pictures if isinstance(pictures, Rejected) else _sample(place, said, pictures, source, (role, content))


def _sample(
    place: str, said: list[tuple[str | None, object]], pictures: list[bytes], source: str, fields: tuple[str, str]
) -> Sample | Rejected:
    if not said:
        return Rejected(place, "empty", "the conversation has no turns")
    system: tuple[Message, ...] = ()
    if said[0][0] == "system" and isinstance(said[0][1], str):
        system = ({"role": "system", "content": [text(said[0][1])]},) if said[0][1].strip() else ()
        said = said[1:]
    for i, (role, value) in enumerate(said):
        due = ("user", "assistant")[i % 2]
        if role != due:
            return Rejected(place, "bad_record", f"turn {i} is not the {due} turn that is due (field {fields[0]})")
        if not isinstance(value, str):
            return Rejected(place, "bad_record", f"turn {i} has no text (field {fields[1]})")
    try:
        messages = system + dialogue([value for _, value in said], n_images=len(pictures))
    except ValueError as error:
        return Rejected(place, "bad_record", str(error))
    if not any(message["role"] == "assistant" for message in messages):
        return Rejected(place, "empty", "nobody answers")
    return by_content(source, pictures, messages, {"id": place})
