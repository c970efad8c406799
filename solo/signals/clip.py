"""Signal of how well picture and text belong together: a CLIP model read by transformers from a local folder.

In: arguments `weights` (a folder in Hugging Face layout, relative to the spec folder) and `revision` (its pin, as
`solo revision FOLDER` prints it). NULL without image or text. Invariant: without weights there is no signal: the spec
that lists it is an error, nothing is fetched and nothing faked. Cost: a forward pass of both towers a sample.
"""

from __future__ import annotations

import multiprocessing
from functools import cache
from pathlib import Path
from typing import Any, TypedDict

from solo.acquire.part import content_sha256
from solo.filter.pictures import Pictures
from solo.sample import Sample
from solo.spec import SpecError

VERSIONS = {"similarity": 1}


class Similarity(TypedDict):
    """Columns of `similarity`: cosine of the first image and the text (cut at the model's length), -1 to 1."""

    clip_similarity: float | None


def similarity(sample: Sample, pictures: Pictures, *, weights: Path, revision: str) -> Similarity:
    """The cosine of the two embeddings."""
    import torch

    text = " ".join(item["text"].strip() for m in sample.messages for item in m["content"] if "text" in item)
    model, tokenizer, images = _model(weights, revision)
    pixels = pictures.rgb(0) if pictures.images else None
    if pixels is None or not text.strip():
        return Similarity(clip_similarity=None)
    with torch.inference_mode():
        ids = tokenizer(text, truncation=True, max_length=model.config.text_config.max_position_embeddings)
        given = {name: torch.tensor([ids[name]]) for name in ("input_ids", "attention_mask")}
        pair = model(pixel_values=images(pixels, return_tensors="pt")["pixel_values"], **given)
        cosine = torch.nn.functional.cosine_similarity(pair.image_embeds, pair.text_embeds)
    return Similarity(clip_similarity=round(float(cosine[0]), 4))


@cache
def _model(weights: Path, revision: str) -> tuple[Any, Any, Any]:
    """Model, tokenizer and image processor, once a process, after a look at the pin."""
    import torch
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    found = f"sha256:{content_sha256(weights)}"
    if found != revision:
        raise SpecError(f"signal clip.similarity: {weights} is {found}, the spec pins {revision}; set revision to it")
    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)  # one process a core already
    local: dict[str, Any] = {"pretrained_model_name_or_path": weights, "local_files_only": True}
    model: Any = CLIPModel.from_pretrained(**local, use_safetensors=True)
    processor: Any = AutoImageProcessor
    return model.eval(), AutoTokenizer.from_pretrained(**local), processor.from_pretrained(**local)
