"""Hand-written manifests of a small recipe whose counts close; tests break one number and look at what notices."""

from dataclasses import replace
from typing import Any

from solo.artifact import Manifest


def manifest(part: str, name: str, counts: tuple[int, int, dict[str, int]], **fields: Any) -> Manifest:
    n_in, n_kept, dropped = counts
    return Manifest(
        part=part,
        name=name,
        fingerprint=f"{part}-{name}"[:8],
        version=1,
        spec=fields.get("spec", {}),
        inputs={i.id: i.digest for i in fields.get("inputs", ())},
        digest=f"digest of {part}/{name}",
        files=[],
        counts={"in": n_in, "kept": n_kept, "dropped": dropped},
        stats=fields.get("stats", {}),
        record={"seconds": 1.5, "made_at": 0.0, "commit": "unknown"},
    )


def tokens(n_text: int, n_patches: int, n_loss: int) -> dict[str, int]:
    return {"n_tokens": n_text + n_patches, "n_text_tokens": n_text, "n_patches": n_patches, "n_loss_tokens": n_loss}


def acquired(name: str, *, n_in: int, n_kept: int, n_lost: int) -> Manifest:
    stats = {"bytes": 5, "n_images": n_kept, "n_shards": 1, "by_status": {"ok": n_kept, "http_404": n_lost}}
    dropped = {"http_404": n_lost}
    return manifest("acquire", name, (n_in, n_kept, dropped), spec={"revision": f"sha256:{name}"}, stats=stats)


def line() -> list[Manifest]:
    """Two sources, two stages, one benchmark; `zebra` is trained before `apple`, against the alphabet."""
    found: list[Manifest] = []
    shards = []
    for name, n_patches in (("pictures", 300), ("text", 0)):
        a = acquired(name, n_in=12, n_kept=10, n_lost=2)
        f = manifest("filter", name, (10, 8, {"too_small": 2}), inputs=[a], stats={"n_samples": 10})
        counted = tokens(100, n_patches, 80) | {"n_shards": 1, "n_samples": 8, "n_images": 8, "bytes": 9}
        said = {"n_system_tokens": 0, "n_user_tokens": 12, "n_assistant_tokens": 80, "n_markup_tokens": 8}
        counted |= said | {"n_images_as_came": 3, "n_images_bare": 1, "n_images_jpeg": 2, "n_images_png": 2}
        s = manifest("shard", name, (8, 8, {}), inputs=[a, f], stats=counted)
        shards.append(s)
        found += [a, f, s]
    for stage, mix in (("zebra", "mix-1"), ("apple", "mix-2")):
        before = [m for m in found if m.part == "train"]
        own = {
            "pictures": tokens(100, 300, 80) | {"n_samples": 8, "n_exposures": 8, "epochs": 1.0},
            "text": tokens(100, 0, 80) | {"n_samples": 8, "n_exposures": 8, "epochs": 1.0},
        }
        total = tokens(200, 300, 160)
        drawn = total | {"n_samples": 16, "n_exposures": 16, "sources": own}
        c = manifest("curate", mix, (16, 16, {"not_drawn": 0}), inputs=shards, stats=drawn)
        packed = {"n_packs": 4, "n_documents": 16, "pack_tokens": 128, "fill": 0.976563, "n_splits": 0, "sources": own}
        p = manifest("pack", mix, (16, 16, {"over_long": 0}), inputs=[c], stats=total | packed)
        per_source = {s: {"n_tokens": v["n_tokens"], "n_loss_tokens": 80, "loss_last": 2.0} for s, v in own.items()}
        trained = {"n_packs": 4, "n_steps": 2, "loss_first": 5.0, "loss_last": 3.0, "tokens_per_s": 9.0}
        trained |= {"n_tokens": 500, "n_loss_tokens": 160, "ranks": 1, "n_parameters": 7, "sources": per_source}
        trained |= {"left_out": {"documents": 0, "tokens": 0, "loss_tokens": 0}}
        found += [c, p, manifest("train", stage, (16, 16, {"damaged": 0}), inputs=[p, *shards, *before], stats=trained)]
    last = found[-1]
    scored = {"score": 0.5, "chance": 0.1, "blind": 0.125, "n_questions": 8, "by_category": {}}
    scored |= {"checkpoint_digest": last.digest, "protocol": "p"}
    found.append(manifest("evaluate", "digits", (8, 8, {}), inputs=[last], stats=scored))
    return found


def changed(found: list[Manifest], node: str, **fields: Any) -> list[Manifest]:
    """The same manifests with fields of one of them replaced; dicts are merged."""

    def merged(m: Manifest) -> dict[str, Any]:
        return {k: {**getattr(m, k), **v} if isinstance(v, dict) else v for k, v in fields.items()}

    return [replace(m, **merged(m)) if m.id == node else m for m in found]
