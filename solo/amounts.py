"""Amounts: how much of each source of a mix is drawn, from what its spec asks and what there is.

In: a `MixSpec` and the eligible samples and tokens of each source. Out: one `Draw` a source. Invariant: arithmetic in
fractions of the decimals that the YAML shows, so 1.84 epochs are 184 hundredths and not a hair more. Cost: none.

Rounding: an amount becomes whole passes over the eligible samples and a rest; the rest is the longest prefix in hash
order whose cumulative tokens (or samples) do not exceed it (solo/draw.py). A draw in tokens is thus short of its amount
by less than one sample, never over.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from solo.spec import MixSource, MixSpec, SpecError

WEIGHTS_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Draw:
    """How much of one source is drawn: `whole` passes, then a prefix of at most `rest` tokens or samples."""

    whole: int
    rest: int
    in_samples: bool
    short_tokens: int  # asked for by weight, but beyond max_epochs
    why: str


def check_weights(mix: MixSpec) -> None:
    """Weights of a mix are shares of one budget, so they add up to 1."""
    weights = {s.source: s.weight for s in mix.sources if s.weight is not None}
    if weights and abs(sum(weights.values()) - 1) > WEIGHTS_TOLERANCE:
        equation = " + ".join(f"{weight:g} ({source})" for source, weight in weights.items())
        raise SpecError(
            f"mixes/{mix.name}.yaml: sources.weight: {equation} = {sum(weights.values()):g}, not 1; "
            f"weights are shares of budget_tokens, change one so that they add up"
        )


def amount(mix: MixSpec, source: MixSource, n_samples: int, n_tokens: int) -> Draw:
    """What `weight`, `epochs` or `samples` means for `n_samples` eligible samples of `n_tokens` together."""
    if source.samples is not None:
        whole, rest = divmod(source.samples, n_samples)
        return Draw(whole, rest, True, 0, f"{source.samples} of {n_samples} samples")
    asked, short_tokens = Fraction(str(source.epochs or 0)) * n_tokens, 0
    why = f"{source.epochs} epochs of {n_tokens} tokens"
    if source.weight is not None:
        asked = Fraction(str(source.weight)) * (mix.budget_tokens or 0)
        why = f"{source.weight} of budget_tokens {mix.budget_tokens}, from {n_tokens} tokens"
        most = Fraction(str(source.max_epochs)) * n_tokens if source.max_epochs is not None else asked
        if asked > most:
            short_tokens = int(asked - most)
            why += f", short by {short_tokens} at max_epochs {source.max_epochs}"
            asked = most
    passes, left = divmod(asked, n_tokens)
    return Draw(int(passes), int(left), False, short_tokens, why)
