"""Numbers of the objective that change while a student trains, as recipes write them: a number, a schedule, or a rule that
follows the losses. What they are at a step, `teachercache.objective.schedule.objective_schedule` computes.

`t` counts optimizer steps from 0, `t_max` is how many there are (in a phase, of the phase).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from teachercache.section import Section


class LinearSchedule(Section):
    """`start · (1 - rate · t / t_max)`, or a line from `start` to `end`; never below `floor`."""

    schedule: Literal["linear"] = Field(description="a line")
    start: float = Field(description="the value at the first step")
    rate: float | None = Field(None, ge=0, le=1, description="share of start that is gone in the end")
    end: float | None = Field(None, description="in the place of rate: the value in the end")
    floor: float | None = Field(None, description="never below this")

    @model_validator(mode="after")
    def _one_end(self) -> LinearSchedule:
        if (self.rate is None) == (self.end is None):
            raise ValueError("a linear schedule has a rate or an end, one of them")
        return self

    @property
    def last(self) -> float:
        """The value at t_max, were there no floor."""
        return self.start * (1 - self.rate) if self.rate is not None else float(self.end or 0.0)

    @property
    def values(self) -> tuple[float, ...]:
        """Its extremes."""
        lowest = -float("inf") if self.floor is None else self.floor
        return max(self.start, lowest), max(self.last, lowest)


class CosineSchedule(Section):
    """`end + (start - end) · (1 + cos(π t / t_max)) / 2`: flat at both ends."""

    schedule: Literal["cosine"] = Field(description="half a cosine")
    start: float = Field(description="the value at the first step")
    end: float = Field(description="the value at the last step")

    @property
    def values(self) -> tuple[float, ...]:
        """Its extremes."""
        return self.start, self.end


class StepwiseSchedule(Section):
    """`values[0]`, from the fraction `at[0]` of the steps on `values[1]`, and so on."""

    schedule: Literal["phases"] = Field(description="steps")
    values: tuple[float, ...] = Field(min_length=2, description="one after the other")
    at: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(description="fractions of the steps, rising")

    @model_validator(mode="after")
    def _each_begins(self) -> StepwiseSchedule:
        if len(self.at) != len(self.values) - 1:
            raise ValueError(
                f"{len(self.values)} values need {len(self.values) - 1} fractions in `at`, where each but the first begins; "
                f"there are {len(self.at)}"
            )
        if list(self.at) != sorted(set(self.at)):
            raise ValueError("the fractions in `at` must rise")
        return self


class StudentLossSchedule(Section):
    """Temperature that follows the student's own loss: `base + strength · (mean of ω - ω)` within `least` and `most`, with
    ω = (1 - p)^focus the focal weight of the step before, p = exp(-cross-entropy) the student's probability of the token
    that follows, and the mean over the last `window` steps. Where the student finds a step harder than it used to, the
    teacher is asked for sharper distributions.

    Wen, Lai & Qian, "Preparing Lessons: Improve Knowledge Distillation with Better Supervision", 2019 (DTD with FLSW), with a
    step's positions in the place of one sample.
    """

    schedule: Literal["student-loss"] = Field(description="follows the student's loss")
    base: float = Field(gt=0, description="the temperature where the loss is as usual")
    strength: float = Field(40.0, gt=0, description="how far the temperature follows ω")
    focus: float = Field(1.0, gt=0, description="exponent of the focal weight ω")
    window: int = Field(100, ge=1, description="steps over which the mean of ω is taken")
    least: float = Field(1.0, gt=0, description="never below this")
    most: float = Field(gt=0, description="never above this")

    @model_validator(mode="after")
    def _in_order(self) -> StudentLossSchedule:
        if not self.least <= self.base <= self.most:
            raise ValueError(f"least ({self.least:g}) <= base ({self.base:g}) <= most ({self.most:g}) must hold")
        return self

    @property
    def values(self) -> tuple[float, ...]:
        """Its extremes."""
        return self.least, self.most


class Balance(Section):
    """Common part of the rules for alpha: each begins at `start`, stays within `least` and `most`, and follows the
    losses of the last `window` steps."""

    start: float = Field(0.5, ge=0, le=1, description="alpha at the first step")
    window: int = Field(100, ge=1, description="steps whose losses are looked at")
    least: float = Field(0.05, gt=0, lt=1, description="alpha is never below this")
    most: float = Field(0.95, gt=0, le=1, description="alpha is never above this")

    @model_validator(mode="after")
    def _in_order(self) -> Balance:
        if not self.least <= self.start <= self.most:
            raise ValueError(f"least ({self.least:g}) <= start ({self.start:g}) <= most ({self.most:g}) must hold")
        return self

    @property
    def values(self) -> tuple[float, ...]:
        """Its extremes."""
        return self.least, self.most


class RatioBalance(Balance):
    """Once more than `window` distillation losses are recorded: where the mean of the last `window` exceeds `high` times the
    task loss, alpha = max(least, down · alpha); where it is below `low` times the task loss, alpha = min(most, up · alpha).
    The defaults are those of the article that calls it a gradient balancer."""

    balance: Literal["ratio"] = Field(description="by the ratio of the losses")
    start: float = Field(0.7, ge=0, le=1, description="alpha at the first step")
    high: float = Field(1.5, gt=0, description="alpha shrinks where the ratio is above this")
    low: float = Field(0.7, gt=0, description="alpha grows where the ratio is below this")
    down: float = Field(0.95, gt=0, le=1, description="factor by which alpha shrinks")
    up: float = Field(1.05, ge=1, description="factor by which alpha grows")
    least: float = Field(0.5, gt=0, lt=1, description="alpha is never below this")
    most: float = Field(0.9, gt=0, le=1, description="alpha is never above this")

    @model_validator(mode="after")
    def _low_below_high(self) -> RatioBalance:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        return self


class UncertaintyBalance(Balance):
    """Each term weighs 1 / loss, by the means of the last `window` steps, normalised to one. These are the weights of Kendall,
    Gal & Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses", CVPR 2018, where their uncertainties are at the
    optimum for these losses (Kirchdorfer et al., "Analytical Uncertainty-Based Loss Weighting in Multi-Task Learning",
    2024)."""

    balance: Literal["uncertainty"] = Field(description="by 1 / loss")


def _tag(value: Any) -> str:
    """Names the member of a union that a value of a recipe is meant to be."""
    if isinstance(value, Section):
        return str(getattr(value, "schedule", None) or getattr(value, "balance", NUMBER))
    if isinstance(value, dict):
        return str(value.get("schedule") or value.get("balance") or NOTHING)
    return NUMBER


NUMBER, NOTHING = "number", "nothing"
_Linear = Annotated[LinearSchedule, Tag("linear")]
_Cosine = Annotated[CosineSchedule, Tag("cosine")]
_Stepwise = Annotated[StepwiseSchedule, Tag("phases")]
_chosen = Discriminator(_tag)

Schedule = LinearSchedule | CosineSchedule | StepwiseSchedule
Scheduled = Annotated[Annotated[float, Tag(NUMBER)] | _Linear | _Cosine | _Stepwise, _chosen]
Temperature = Annotated[
    Annotated[float, Tag(NUMBER)] | _Linear | _Cosine | _Stepwise | Annotated[StudentLossSchedule, Tag("student-loss")],
    _chosen,
]
Alpha = Annotated[
    Annotated[float, Tag(NUMBER)]
    | _Linear
    | _Cosine
    | _Stepwise
    | Annotated[RatioBalance, Tag("ratio")]
    | Annotated[UncertaintyBalance, Tag("uncertainty")],
    _chosen,
]


def values_of(number: Any) -> tuple[float, ...]:
    """A number, or the extremes of what a schedule or a rule makes of it."""
    return number.values if isinstance(number, Section) else (number,)  # type: ignore[attr-defined]


MOST_TEMPERATURE = 100.0  # beyond it the difference of two softened distributions is rounding, times T²


def within(number: Any, *, name: str, least: float, most: float = float("inf"), open_below: bool = False) -> Any:
    """The number, or the schedule; raises `ValueError` where a value of it lies outside."""
    for value in values_of(number):
        if not (least < value if open_below else least <= value) or value > most:
            bound = f"above {least:g}" if open_below else f"{least:g} or more"
            bound = bound if most == float("inf") else f"{bound} and at most {most:g}"
            raise ValueError(f"{name} must be {bound}, and becomes {value:g}")
    return number
