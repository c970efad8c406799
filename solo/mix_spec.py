"""Mix spec: the YAML of one training stage's samples, as frozen and strict types.

In: fields of `datasets_spec/mixes/*.yaml`. Out: validated objects; solo/spec.py loads them. Invariant: exactly one
thing says how much of a source is drawn: its weight, epochs or samples, or the sql of the mix. Cost: none.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from solo.strict import Spec, off


class Near(Spec):
    """How alike two samples may be before one of them is dropped; what is left out is not compared."""

    image: int | None = Field(default=None, ge=0, le=3, description="bits of 64 in which `phash` may differ")
    colour: int | None = Field(default=None, ge=0, le=255, description="and levels in which `colours` may differ")
    text: float | None = Field(default=None, ge=0.7, le=1, description="share of equal minima in `minhash`")

    @model_validator(mode="after")
    def _colour_of_an_image(self) -> Near:
        if self.colour is not None and self.image is None:
            raise ValueError("colour narrows what image finds; give image (0..3) too")
        return self


class Most(Spec):
    """A limit in one unit."""

    samples: int | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one_unit(self) -> Most:
        if (self.samples is None) == (self.tokens is None):
            raise ValueError("a quota is in samples or in tokens; give exactly one of them")
        return self


class Quota(Most):
    """At most so much of each class of a source, in hash order; what is over it cannot be drawn."""

    by: str = Field(description="SQL over ledger columns; its value is the class, and NULL is one too")


class TextShare(Spec):
    """Between which shares of its tokens a mix must have from samples without images; outside it is refused."""

    least: float = Field(default=0, ge=0, le=1)
    most: float = Field(default=1, ge=0, le=1)


class MixSource(Spec):
    """One source's share in a mix; exactly one of `weight`, `epochs` and `samples` says how much."""

    source: str
    weight: float | None = Field(default=None, gt=0, description="share of the mix's budget")
    epochs: float | None = Field(default=None, gt=0)
    samples: int | None = Field(default=None, gt=0)
    max_epochs: float | None = Field(default=None, gt=0, description="cap on repeats when drawn by weight")
    where: dict[str, str] = Field(default={}, description="name -> SQL over ledger columns; not true = dropped")
    category: str | None = Field(
        default=None, exclude_if=off, min_length=1, description="what `quotas` of the mix and pages group by"
    )
    quotas: dict[str, Quota] = Field(
        default={}, exclude_if=off, description="name -> limit on each class; one after the other"
    )

    @property
    def amounts(self) -> list[str]:
        """Names of the fields given that say how much."""
        return [k for k in ("weight", "epochs", "samples") if getattr(self, k) is not None]


class MixSpec(Spec):
    """The samples of one training stage, as a query over ledgers."""

    name: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    title: str
    seed: int
    budget_tokens: int | None = Field(default=None, gt=0, description="what weights are shares of: this,")
    budget_samples: int | None = Field(default=None, exclude_if=off, gt=0, description="or this,")
    budget_packs: int | None = Field(default=None, exclude_if=off, gt=0, description="or whole packs of `pack_tokens`")
    pack_tokens: int | None = Field(default=None, exclude_if=off, gt=1, description="of the stage that trains the mix")
    unique: tuple[str, ...] = Field(default=(), description="as a source's, across sources: the first listed wins")
    near: Near = Field(default=Near(), description="as a source's, across sources: the first listed wins")
    decontaminate: tuple[str, ...] = Field(default=(), description="benchmarks whose items may not be in the mix")
    quotas: dict[str, Most] = Field(
        default={}, exclude_if=off, description="category -> limit on what its sources give, repeats counted"
    )
    text_share: TextShare | None = Field(default=None, exclude_if=off)
    sql: str | None = Field(
        default=None,
        exclude_if=off,
        description="SELECT key, source, n_repeats over the views of solo/curate/mix_sql.py, in place of amounts",
    )
    sources: tuple[MixSource, ...] = Field(min_length=1)

    @property
    def budgets(self) -> dict[str, int]:
        """The budgets given, by the unit of the weights."""
        given = {unit: getattr(self, f"budget_{unit}") for unit in ("tokens", "samples", "packs")}
        return {unit: n for unit, n in given.items() if n is not None}

    @model_validator(mode="after")
    def _amounts(self) -> MixSpec:
        names = [s.source for s in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"a source appears twice in sources: {names}")
        for s in self.sources:
            if self.sql is not None and s.amounts:
                raise ValueError(f"{s.source}: sql says how much, so {s.amounts[0]} cannot; take one of them out")
            if self.sql is None and len(s.amounts) != 1:
                found = s.amounts or "none"
                raise ValueError(f"{s.source}: give exactly one of weight, epochs, samples; got {found}")
        weighted = [s.source for s in self.sources if s.weight is not None]
        if len(self.budgets) != bool(weighted):
            raise ValueError(
                "exactly one of budget_tokens, budget_samples, budget_packs is needed exactly when a source has a "
                f"weight; weights on: {weighted}"
            )
        if (self.budget_packs is None) != (self.pack_tokens is None):
            raise ValueError("budget_packs and pack_tokens are given together or not at all")
        return self

    @model_validator(mode="after")
    def _categories(self) -> MixSpec:
        known = sorted({s.category for s in self.sources if s.category is not None})
        if unknown := sorted(set(self.quotas) - set(known)):
            raise ValueError(f"quotas: no source has category {unknown[0]!r}; categories are {known}")
        if self.quotas and self.sql is not None:
            raise ValueError("quotas: they cut amounts, which sql gives itself; take one of them out")
        if self.text_share and self.text_share.least > self.text_share.most:
            raise ValueError(f"text_share: least {self.text_share.least:g} is over most {self.text_share.most:g}")
        return self
