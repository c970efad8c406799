"""URL lists for instruction tuning: as `url_list.download`, with a question before each caption.

Sample: a user turn (image, question) and an assistant turn (caption). Everything else is url_list's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from solo.acquire.part import Fetched
from solo.adapters import url_list
from solo.artifact import Job
from solo.sample import IMAGE, Message, Sample, text


def download(location: Path, *, source: str, job: Job, question: str, **listed: Any) -> Iterator[Fetched]:
    """One item for each row; `listed` are the arguments of `url_list.download`."""
    try:
        inspect.signature(url_list.download).bind(location, source=source, job=job, **listed)
    except TypeError as error:
        raise ValueError(f"{source}: acquire.args: {error}, as for url_list.download") from None
    for item in url_list.download(location, source=source, job=job, **listed):
        yield replace(item, sample=_asked(item.sample, question)) if item.sample else item


def _asked(sample: Sample, question: str) -> Sample:
    asked: Message = {"role": "user", "content": [IMAGE, text(question)]}
    caption = [item for item in sample.messages[0]["content"] if item["type"] == "text"]
    return replace(sample, messages=(asked, {"role": "assistant", "content": caption}))
