"""Schedule of a run's objective: its alpha, its temperature and the weights of its terms at each step.

A schedule of `objective:` runs over all steps of a run, one of a phase over the phase's. A rule knows the losses up to the step
before: a step's gradient is formed together with its loss, so that its weights are settled first. What rules remember is saved
with checkpoints; they are told the losses of the global batch, so that all processes remember the same.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from teachercache.config import ObjectiveConfig, PhaseConfig
from teachercache.config.phases import phase_ends
from teachercache.errors import RecipeError
from teachercache.objective.layers.objective import names_of
from teachercache.objective.logits.operands import Weights
from teachercache.schedules.contract import Rule, Schedule
from teachercache.schedules.numbers import extremes_of, probes_of, rule_of, value_at


@dataclass(frozen=True)
class ScheduleRange:
    """Range of what a run asks of its caches: whether for a teacher at all, and at which temperatures, of schedules
    some between their extremes too."""

    uses_teacher: bool
    temperatures: tuple[float, ...]

    @classmethod
    def of(cls, config: ObjectiveConfig, phases: Sequence[PhaseConfig] = ()) -> ScheduleRange:
        """Collects the range of all phases together."""
        pairs = [
            (
                config.alpha if phase.alpha is None else phase.alpha,
                config.temperature if phase.temperature is None else phase.temperature,
            )
            for phase in phases
        ] or [(config.alpha, config.temperature)]
        asked = [temperature for alpha, temperature in pairs if max(extremes_of(alpha)) > 0]
        return cls(bool(asked), tuple(dict.fromkeys(value for number in asked for value in probes_of(number))))


@dataclass(frozen=True)
class _Number:
    """A number of the objective: as the recipe has it, the steps that it runs over, and the rule that decides it, if any."""

    value: float | Schedule
    first: int
    steps: int
    rule: Rule | None = None

    def at(self, step: int) -> float:
        """Returns the value at a step; where a rule decides, for the step after those that it was told of."""
        return value_at(self.value, self.first, self.steps, step=step) if self.rule is None else self.rule.value


@dataclass(frozen=True)
class _Part:
    """Values of a phase, or of a run without phases."""

    name: str | None
    alpha: _Number
    temperature: _Number
    terms: Mapping[str, _Number]
    learning_rate_factor: float


class ObjectiveSchedule:
    """The settings of every step of a run of `steps`.

    Raises `RecipeError` for phases that do not cover the steps, or that weigh terms which the objective does not have.
    """

    def __init__(
        self, config: ObjectiveConfig, *, steps: int, phases: Sequence[PhaseConfig] = (), across: bool = False
    ) -> None:
        """`across` says that the student has another tokenizer, so that `objective.across` is what it learns by."""
        self.schedule_range = ScheduleRange.of(config, phases)
        self._rules: dict[str, Rule] = {}  # by what they decide
        weights = dict(zip(names_of(config.layers), (term.weight for term in config.layers), strict=True))
        weights |= {term.match: term.weight for term in config.across if across}
        self._whole = _Part(
            name=None,
            alpha=self._number("alpha", config.alpha, 0, steps),
            temperature=self._number("temperature", config.temperature, 0, steps),
            terms={name: _Number(weight, 0, steps) for name, weight in weights.items()},
            learning_rate_factor=1.0,
        )
        self._ends = phase_ends(phases, steps=steps) if phases else [steps]
        begins = [0, *self._ends[:-1]]
        self._parts = [
            self._part(phase, begin, end - begin)
            for phase, begin, end in zip(phases, begins, self._ends, strict=bool(phases))
        ] or [self._whole]
        _check_used(self._whole, self._parts)
        _check_terms(config, self._parts)

    def _number(self, name: str, value: float | Schedule, first: int, steps: int) -> _Number:
        rule = rule_of(value)
        if rule is not None:
            self._rules[name] = rule
        return _Number(value, first, steps, rule)

    def _part(self, phase: PhaseConfig, first: int, steps: int) -> _Part:
        whole = self._whole
        unknown = next((name for name in phase.weights if name not in whole.terms), None)
        if unknown is not None:
            known = f"the terms are: {', '.join(whole.terms)}" if whole.terms else "the objective has no terms"
            raise RecipeError(f"phases: {phase.name} weighs {unknown}, which is no term of the objective; {known}")
        phase_terms = {name: _Number(weight, first, steps) for name, weight in phase.weights.items()}
        alpha, temperature = whole.alpha, whole.temperature
        if phase.alpha is not None:
            alpha = _Number(phase.alpha, first, steps)
        if phase.temperature is not None:
            temperature = self._number(f"temperature from step {first} on", phase.temperature, first, steps)
        return _Part(phase.name, alpha, temperature, {**whole.terms, **phase_terms}, phase.learning_rate_factor)

    def _at(self, step: int) -> _Part:
        return self._parts[min(bisect_right(self._ends, step), len(self._ends) - 1)]

    def phase_at(self, step: int) -> str | None:
        """The name of a step's phase; None where there are no phases."""
        return self._at(step).name

    def at(self, step: int) -> Weights:
        """Returns the values of a step; the first is 0. Where rules decide: of the step after those that they were told
        of."""
        part = self._at(step)
        alpha = part.alpha.at(step)
        terms = {name: weight.at(step) for name, weight in part.terms.items()}
        return Weights(alpha, part.temperature.at(step) if alpha > 0 else 1.0, terms)

    def learning_rate_factor(self, step: int) -> float:
        """Returns the factor of a step's learning rate."""
        return self._at(step).learning_rate_factor

    @property
    def changes(self) -> bool:
        """Tells whether anything differs between steps."""
        part = self._parts[0]
        numbers = [part.alpha, part.temperature, *part.terms.values()]
        return len(self._parts) > 1 or any(not isinstance(number.value, float | int) for number in numbers)

    @property
    def adapts(self) -> bool:
        """Tells whether it has to be told the losses of each step."""
        return bool(self._rules)

    def update(self, step: int, *, distillation: float, ce: float) -> None:
        """Take in the losses of a step, nats a position: what alpha weighs (T² · divergence), and cross-entropy. Rules that
        decided nothing in that step learn nothing from it."""
        part = self._at(step)
        for number in (part.alpha, part.temperature):
            if number.rule is not None:
                number.rule.update(distillation=distillation, ce=ce)

    def state_dict(self) -> dict[str, Any]:
        """Returns what rules remember, as JSON."""
        return {name: rule.state_dict() for name, rule in self._rules.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        for name, rule in self._rules.items():
            rule.load_state_dict(state[name])


def _check_used(whole: _Part, parts: Sequence[_Part]) -> None:
    for name in ("alpha", "temperature"):
        of_phases = [getattr(part, name) for part in parts]
        if getattr(whole, name).rule is not None and getattr(whole, name) not in of_phases:
            raise RecipeError(
                f"objective.{name} follows the losses, and every phase sets its own {name}: leave it out of one of them"
            )


def _check_terms(config: ObjectiveConfig, parts: Sequence[_Part]) -> None:
    """Raise `RecipeError` for what needs both terms that alpha weighs, in a run where there is one alone."""
    alphas = [extremes_of(part.alpha.value) for part in parts]
    missing = "distillation" if all(max(values) == 0 for values in alphas) else None
    missing = "the task" if all(min(values) == 1 for values in alphas) else missing
    if missing is None:
        return
    if config.routing is not None:
        raise RecipeError(f"objective.routing: with this alpha nothing is left of {missing}; leave routing out")
    if config.gradient_cosines is not None and not config.layers:
        raise RecipeError(
            f"objective.gradient_cosines compares terms, and with this alpha nothing is left of {missing}; leave it out"
        )


__all__ = ["ObjectiveSchedule", "ScheduleRange"]
