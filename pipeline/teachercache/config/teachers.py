"""Section `teachers`: further teachers of the same text, whose distributions are fused with those of `cache`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from teachercache.config.location import CacheLocation
from teachercache.section import Section

OFF = 1e-6  # of 1, for sums of decimal fractions
Weight = Annotated[float, Field(ge=0, le=1)]


class FurtherTeacherConfig(Section):
    """Another teacher of the rows of `cache`: rows are matched by source_id and byte span."""

    cache: CacheLocation = Field(description="a folder, or a URL")
    weight: Weight | None = Field(None, description="default: an equal part of what other weights leave of 1")


class TeachersConfig(Section):
    """Several teachers as one, at the current temperature; terms between layers stay with `cache`."""

    caches: tuple[FurtherTeacherConfig, ...] = Field(
        min_length=1, description="of the further teachers, beside `cache`"
    )
    weight: Weight | None = Field(None, description="of `cache` itself; default: as theirs")
    domains: dict[str, tuple[Weight, ...]] = Field(
        {},
        description="weights (of `cache`, then of each of `caches`) in rows of one of the caches that are mixed, by the name "
        "of its folder; default: the weights above",
    )
    fusion: Literal["arithmetic", "geometric"] = Field(
        "arithmetic", description="of the softened distributions: a mixture, or a product of experts"
    )
    weights: Literal["fixed", "confidence", "validation", "validation-student"] = Field(
        "fixed",
        description="as given; or times a factor: of each position by how likely each teacher finds its token; softmax of "
        "the teachers' losses on held-out rows; softmax of the student's distance from each, at every evaluation",
    )
    tau: float = Field(1.0, gt=0, description="validation…: temperature of that softmax, nats per position")
    missing: Literal["others", "skip", "refuse"] = Field(
        "others",
        description="rows that a cache lacks: learn from the teachers that have them, leave distillation out (their labels "
        "still count), or refuse before the first step",
    )

    @model_validator(mode="after")
    def _weights_sum_to_one(self) -> TeachersConfig:
        self.shares()
        for name, weights in self.domains.items():
            if len(weights) != len(self.caches) + 1:
                raise ValueError(
                    f"domains.{name} has {len(weights)} weights for {len(self.caches) + 1} teachers; give one for `cache` and "
                    "one for each of teachers.caches"
                )
            _check_sum(weights, f"domains.{name}")
        if self.tau != 1 and not self.weights.startswith("validation"):
            raise ValueError(f"tau means nothing to weights: {self.weights}; leave it out")
        return self

    def shares(self) -> tuple[float, ...]:
        """The weights of `cache` and of each of `caches`."""
        weights = (self.weight, *(cache.weight for cache in self.caches))
        known = [weight for weight in weights if weight is not None]
        if len(known) == len(weights) or sum(known) > 1 + OFF:
            _check_sum(known, "the teachers'")
            return tuple(known)
        rest = max(0.0, 1 - sum(known)) / (len(weights) - len(known))
        return tuple(rest if weight is None else weight for weight in weights)


def _check_sum(weights: Sequence[float], whose: str) -> None:
    total = sum(weights)
    if abs(total - 1) > OFF:
        raise ValueError(
            f"{whose} weights sum to {total:g}, and must sum to 1; change one, or leave one out, which then gets the rest"
        )
