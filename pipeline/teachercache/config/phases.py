"""Phases of a run: what differs from one part of its steps to the next."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from pydantic import Field, field_validator, model_validator

from teachercache.errors import RecipeError
from teachercache.schedules.contract import AdaptiveSchedule
from teachercache.schedules.known import Alpha, Scheduled, Temperature
from teachercache.schedules.numbers import MOST_TEMPERATURE, within
from teachercache.section import Section

TOLERANCE = 1e-3  # of sums of shares, which may be rounded thirds


class PhaseConfig(Section):
    """A part of the steps, with what it changes; all else is as in the sections of the recipe. Schedules of a phase run from
    its first step to its last."""

    name: str = Field(min_length=1, description="in logs")
    steps: int | None = Field(
        None, ge=1, description="how many, whatever train.epochs; all phases have steps, or all have a share"
    )
    share: float | None = Field(None, gt=0, le=1, description="of the run's steps; shares add up to 1")
    global_batch: int | None = Field(None, ge=1, description="rows in an optimizer step")
    learning_rate_factor: float = Field(1.0, gt=0, description="multiplies what train.schedule gives")
    temperature: Temperature | None = Field(None, description="in the place of objective.temperature")
    alpha: Alpha | None = Field(
        None,
        description="in the place of objective.alpha; balances are for that one alone",
        json_schema_extra={"refused": "balance"},
    )
    weights: dict[str, Scheduled] = Field(
        {}, description="of terms of objective.layers or .across, by their names in logs"
    )
    mix: dict[str, float] | None = Field(
        None,
        description="share of each cache in the rows, by the name of its folder; the others give none; shares add up to 1",
    )

    @field_validator("temperature")
    @classmethod
    def _positive(cls, value: Temperature | None) -> Temperature | None:
        return (
            None
            if value is None
            else within(value, name="temperature", least=0, most=MOST_TEMPERATURE, open_below=True)
        )

    @field_validator("alpha")
    @classmethod
    def _a_share(cls, value: Alpha | None) -> Alpha | None:
        if isinstance(value, AdaptiveSchedule):
            raise ValueError("a balance belongs into objective.alpha; it goes on over the phases that set no alpha")
        return None if value is None else within(value, name="alpha", least=0, most=1)

    @field_validator("weights")
    @classmethod
    def _not_negative(cls, value: dict[str, Scheduled]) -> dict[str, Scheduled]:
        return {name: within(weight, name=f"the weight of {name}", least=0) for name, weight in value.items()}

    @model_validator(mode="after")
    def _one_length(self) -> PhaseConfig:
        if (self.steps is None) == (self.share is None):
            raise ValueError("a phase has steps or a share of them, one of the two")
        if self.mix is not None:
            if not self.mix or min(self.mix.values()) < 0:
                raise ValueError("shares in mix must be there, and not be negative")
            if abs(sum(self.mix.values()) - 1) > TOLERANCE:
                raise ValueError(f"shares in mix add up to {sum(self.mix.values()):g}; they must add up to 1")
        return self


def phase_ends(phases: Sequence[PhaseConfig], *, steps: int) -> list[int]:
    """The step that follows the last one of each phase. Raises `RecipeError` where phases leave steps of the run uncovered, go
    beyond it, or have none."""
    if all(phase.steps is not None for phase in phases):
        ends = _summed([phase.steps or 0 for phase in phases])
        if ends[-1] != steps:
            raise RecipeError(
                f"phases: they cover {ends[-1]} steps, and the run has {steps}; change their steps, or train.max_steps"
            )
        return ends
    if any(phase.share is None for phase in phases):
        raise RecipeError("phases: some have steps and some a share; give all of them steps, or all of them a share")
    shares = _summed([phase.share or 0.0 for phase in phases])
    if abs(shares[-1] - 1) > TOLERANCE:
        raise RecipeError(f"phases: they cover {shares[-1]:.4g} of the steps; their shares must add up to 1")
    ends = [*(round(share * steps) for share in shares[:-1]), steps]
    for phase, (before, end) in zip(phases, pairwise([0, *ends]), strict=True):
        if end <= before:
            raise RecipeError(f"phases: {phase.name} has none of the run's {steps} steps; give it a larger share")
    return ends


def steps_of(phases: Sequence[PhaseConfig]) -> int | None:
    """All steps of phases that say how many; None where they have shares, or there are none."""
    if not phases or any(phase.steps is None for phase in phases):
        return None
    return sum(phase.steps or 0 for phase in phases)


def _summed(lengths: Sequence[Any]) -> list[Any]:
    return [sum(lengths[: number + 1]) for number in range(len(lengths))]
