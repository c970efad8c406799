"""Amounts: how much of each source of a mix is drawn, from what its spec asks and what there is.

In: a `MixSpec` and the eligible samples and tokens of each source. Out: one `Draw` a source, and what the quotas of
categories took away. Invariant: arithmetic in fractions of the decimals that the YAML shows, so 1.84 epochs are 184
hundredths and not a hair more. Cost: none.

Rounding: an amount becomes whole passes over the eligible samples and a rest; the rest is the longest prefix in hash
order whose cumulative tokens (or samples) do not exceed it (solo/curate/draw.py). A draw in tokens is thus short of its
amount by less than one sample, never over. A category over its quota takes as much of each of its sources as the quota
is of their sum, and whole packs go to the sources with the largest remainders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from solo.spec import MixSource, MixSpec, SpecError

WEIGHTS_TOLERANCE = 1e-6
Eligible = Mapping[str, tuple[int, int]]  # source -> samples, tokens


@dataclass(frozen=True)
class Draw:
    """How much of one source is drawn: `whole` passes, then a prefix of at most `rest` tokens or samples."""

    whole: int
    rest: int
    in_samples: bool
    asked: int  # in its unit, before any cap
    short: int  # of it, for max_epochs
    cut: int  # of it, for the quota of its category
    why: str

    @property
    def unit(self) -> str:
        """What its numbers count."""
        return "samples" if self.in_samples else "tokens"


@dataclass(frozen=True)
class Ask:
    """An amount of one source before quotas."""

    amount: Fraction
    in_samples: bool
    asked: Fraction
    why: str

    @property
    def unit(self) -> str:
        """What its numbers count."""
        return "samples" if self.in_samples else "tokens"


def check_weights(mix: MixSpec) -> None:
    """Weights of a mix are shares of one budget, so they add up to 1."""
    weights = {s.source: s.weight for s in mix.sources if s.weight is not None}
    if weights and abs(sum(weights.values()) - 1) > WEIGHTS_TOLERANCE:
        equation = " + ".join(f"{weight:g} ({source})" for source, weight in weights.items())
        (unit,) = mix.budgets
        raise SpecError(
            f"mixes/{mix.name}.yaml: sources.weight: {equation} = {sum(weights.values()):g}, not 1; "
            f"weights are shares of budget_{unit}, change one so that they add up"
        )


def of(mix: MixSpec, eligible: Eligible) -> tuple[dict[str, Draw], dict[str, dict[str, Any]]]:
    """What each source gives, and each quota's unit, limit and what its category asked for."""
    packs = whole_packs(mix)
    asks = {s.source: ask(mix, s, *eligible[s.source], packs.get(s.source, 0)) for s in mix.sources}
    allowed, quotas = {source: a.amount for source, a in asks.items()}, {}
    for category, quota in mix.quotas.items():
        members = [s.source for s in mix.sources if s.category == category]
        unit, most = ("samples", quota.samples) if quota.samples is not None else ("tokens", quota.tokens)
        assert most is not None
        for source in members:
            if asks[source].unit != unit:
                raise SpecError(
                    f"mixes/{mix.name}.yaml: quotas.{category} is in {unit}, but {source} is drawn in "
                    f"{asks[source].unit}; give both in one unit"
                )
        total = sum((allowed[source] for source in members), Fraction(0))
        quotas[category] = {"unit": unit, "most": most, "asked": int(total)}
        for source in members if total > most else ():
            allowed[source] *= Fraction(most) / total
    return {s.source: _draw(asks[s.source], allowed[s.source], *eligible[s.source]) for s in mix.sources}, quotas


def ask(mix: MixSpec, source: MixSource, n_samples: int, n_tokens: int, n_packs: int = 0) -> Ask:
    """What `weight`, `epochs` or `samples` means for `n_samples` eligible samples of `n_tokens` together."""
    if source.samples is not None:
        asked, why = Fraction(source.samples), f"{source.samples} of {n_samples} samples"
        return Ask(asked, True, asked, why)
    if source.weight is None:
        asked = Fraction(str(source.epochs or 0)) * n_tokens
        return Ask(asked, False, asked, f"{source.epochs} epochs of {n_tokens} tokens")
    ((unit, budget),) = mix.budgets.items()
    in_samples = unit == "samples"
    there = n_samples if in_samples else n_tokens
    asked = Fraction(n_packs * (mix.pack_tokens or 0)) if unit == "packs" else Fraction(str(source.weight)) * budget
    why = f"{source.weight} of budget_{unit} {budget}, from {there} {'samples' if in_samples else 'tokens'}"
    if unit == "packs":
        why = f"{source.weight} of budget_packs {budget}, {n_packs} packs of {mix.pack_tokens}, from {n_tokens} tokens"
    most = Fraction(str(source.max_epochs)) * there if source.max_epochs is not None else asked
    if asked > most:
        why += f", short by {int(asked - most)} at max_epochs {source.max_epochs}"
    return Ask(min(asked, most), in_samples, asked, why)


def whole_packs(mix: MixSpec) -> dict[str, int]:
    """Packs of each source where weights are shares of packs: they add up to the budget."""
    if mix.budget_packs is None:
        return {}
    shares = {s.source: Fraction(str(s.weight)) * mix.budget_packs for s in mix.sources if s.weight is not None}
    packs = {source: int(share) for source, share in shares.items()}
    left = mix.budget_packs - sum(packs.values())
    for source in sorted(shares, key=lambda s: (packs[s] - shares[s], s))[:left]:
        packs[source] += 1
    return packs


def _draw(ask: Ask, allowed: Fraction, n_samples: int, n_tokens: int) -> Draw:
    passes, left = divmod(allowed, n_samples if ask.in_samples else n_tokens)
    own = Draw(
        int(passes), int(left), ask.in_samples, int(ask.asked), int(ask.asked - ask.amount), int(ask.amount - allowed),
        ask.why,
    )  # fmt: skip
    return replace(own, why=f"{own.why}, cut by {own.cut} for its category's quota") if own.cut else own
