"""Schedules, rules and phases: what the objective is at each step."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teachercache.config import ObjectiveConfig, PhaseConfig, parse_recipe
from teachercache.errors import RecipeError
from teachercache.objective.objective_schedule import ObjectiveSchedule, ScheduleRange

STEPS = 120


def schedule_of(
    *phases: dict[str, Any], steps: int = STEPS, across: bool = False, **objective: Any
) -> ObjectiveSchedule:
    made = [PhaseConfig.model_validate(phase) for phase in phases]
    return ObjectiveSchedule(ObjectiveConfig.model_validate(objective), steps=steps, phases=made, across=across)


def temperatures(schedule: ObjectiveSchedule, steps: int = STEPS) -> list[float]:
    return [schedule.at(step).temperature for step in range(steps)]


def test_a_number_stays_what_it_is() -> None:
    schedule = schedule_of(temperature=3, alpha=0.4)
    assert {(schedule.at(step).temperature, schedule.at(step).alpha) for step in range(STEPS)} == {(3.0, 0.4)}
    assert not schedule.changes and not schedule.adapts and schedule.state_dict() == {}


@given(start=st.floats(1, 8), rate=st.floats(0, 1), floor=st.floats(0.5, 3), step=st.integers(0, STEPS))
def test_the_linear_schedule_is_the_articles(start: float, rate: float, floor: float, step: int) -> None:
    schedule = schedule_of(temperature={"schedule": "linear", "start": start, "rate": rate, "floor": floor})
    naive = max(floor, start * (1 - rate * step / STEPS))
    assert schedule.at(step).temperature == pytest.approx(naive, rel=1e-12)


def test_a_line_ends_where_it_is_told_to_or_at_its_floor() -> None:
    schedule = schedule_of(temperature={"schedule": "linear", "start": 5, "end": 1})
    assert (schedule.at(0).temperature, schedule.at(STEPS // 2).temperature, schedule.at(STEPS).temperature) == (
        5,
        3,
        1,
    )
    assert schedule.at(STEPS + 50).temperature == 1
    floored = schedule_of(temperature={"schedule": "linear", "start": 4, "rate": 1.0, "floor": 2})
    assert floored.at(STEPS // 2).temperature == floored.at(STEPS - 1).temperature == 2
    assert floored.at(STEPS // 2 - 1).temperature > 2


def test_phases_of_a_temperature_change_at_their_fractions() -> None:
    """5 → 3 → 1, the first step of each third is the first with its value."""
    schedule = schedule_of(temperature={"schedule": "phases", "values": [5, 3, 1], "at": [1 / 3, 2 / 3]})
    assert temperatures(schedule) == [5.0] * 40 + [3.0] * 40 + [1.0] * 40


@given(start=st.floats(1, 8), end=st.floats(1, 8), step=st.integers(0, STEPS))
def test_the_cosine_is_flat_at_both_ends(start: float, end: float, step: int) -> None:
    schedule = schedule_of(temperature={"schedule": "cosine", "start": start, "end": end})
    naive = end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
    assert schedule.at(step).temperature == pytest.approx(naive, rel=1e-12)
    ends = schedule.at(0).temperature, schedule.at(STEPS).temperature
    assert ends == pytest.approx((start, end))


def test_schedules_are_functions_of_the_step_alone() -> None:
    settings: dict[str, Any] = {
        "temperature": {"schedule": "cosine", "start": 5, "end": 1},
        "alpha": {"schedule": "linear", "start": 0.9, "end": 0.1},
    }
    forwards, backwards = schedule_of(**settings), schedule_of(**settings)
    there = [forwards.at(step) for step in range(STEPS)]
    assert there == [backwards.at(step) for step in reversed(range(STEPS))][::-1]


BALANCES: list[dict[str, Any]] = [
    {"alpha": {"balance": "ratio", "window": 5}},
    {"alpha": {"balance": "uncertainty", "window": 5}},
    {"temperature": {"schedule": "student-loss", "base": 2, "most": 5, "window": 5}},
]


@pytest.mark.parametrize("objective", BALANCES)
@given(losses=st.lists(st.tuples(st.floats(0, 20), st.floats(0, 20)), min_size=2, max_size=40), data=st.data())
def test_what_rules_remember_goes_through_json(objective: dict[str, Any], losses: Any, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(losses)))
    whole, before, after = (schedule_of(**objective) for _ in range(3))
    for step, (distillation, ce) in enumerate(losses):
        whole.update(step, distillation=distillation, ce=ce)
        if step < cut:
            before.update(step, distillation=distillation, ce=ce)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    for step, (distillation, ce) in enumerate(losses[cut:], start=cut):
        after.update(step, distillation=distillation, ce=ce)
    assert after.at(STEPS) == whole.at(STEPS) and after.state_dict() == whole.state_dict()


def test_phases_follow_each_other_with_what_they_change() -> None:
    layers = [{"match": "hidden-cosine", "weight": 2.0}]
    schedule = schedule_of(
        {"name": "layers first", "share": 0.25, "alpha": 0, "learning_rate_factor": 2},
        {"name": "soft", "share": 0.5, "temperature": {"schedule": "linear", "start": 4, "end": 2}},
        {"name": "sharp", "share": 0.25, "temperature": 1, "weights": {"hidden-cosine": 0.5}},
        layers=layers,
    )
    assert [schedule.phase_at(step) for step in (0, 29, 30, 89, 90, 119, 500)] == [
        "layers first", "layers first", "soft", "soft", "sharp", "sharp", "sharp",
    ]  # fmt: skip
    assert [schedule.at(step).alpha for step in (0, 29, 30, 119)] == [0, 0, 0.9, 0.9]
    assert [schedule.at(step).temperature for step in (29, 30, 60, 89, 90)] == pytest.approx([1, 4, 3, 2 + 2 / 60, 1])
    assert [schedule.at(step).terms["hidden-cosine"] for step in (0, 89, 90)] == [2.0, 2.0, 0.5]
    assert [schedule.learning_rate_factor(step) for step in (29, 30)] == [2.0, 1.0]
    assert schedule.schedule_range.uses_teacher and set(schedule.schedule_range.temperatures) >= {4.0, 2.0, 1.0}


def test_a_schedule_of_the_run_goes_on_over_its_phases() -> None:
    schedule = schedule_of(
        {"name": "one", "steps": 60},
        {"name": "two", "steps": 60, "temperature": 7},
        temperature={"schedule": "linear", "start": 5, "end": 1},
    )
    assert schedule.at(59).temperature == pytest.approx(5 - 4 * 59 / 120) and schedule.at(60).temperature == 7


def test_a_rule_learns_from_the_steps_that_it_decides() -> None:
    schedule = schedule_of(
        {"name": "fixed", "steps": 60, "alpha": 0.3},
        {"name": "balanced", "steps": 60},
        alpha={"balance": "uncertainty"},
    )
    schedule.update(0, distillation=1.0, ce=9.0)
    assert schedule.at(0).alpha == 0.3 and schedule.at(60).alpha == 0.5
    schedule.update(60, distillation=1.0, ce=3.0)
    assert schedule.at(61).alpha == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([{"name": "a", "steps": 50}, {"name": "b", "steps": 60}], "cover 110 steps, and the run has 120"),
        (
            [{"name": "a", "share": 0.5}, {"name": "b", "share": 0.4}],
            r"cover 0.9 of the steps; their shares must add up",
        ),
        ([{"name": "a", "share": 0.5}, {"name": "b", "steps": 60}], "some have steps and some a share"),
        ([{"name": "a", "share": 0.999}, {"name": "b", "share": 0.001}], "b has none of the run's 120 steps"),
        ([{"name": "a", "share": 1, "weights": {"angles": 1}}], "a weighs angles, which is no term of the objective"),
    ],
)
def test_phases_that_do_not_fit_the_run_are_refused(phases: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        schedule_of(*phases)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"alpha": -0.1}, "`objective.alpha`: alpha must be 0 or more and at most 1, and becomes -0.1"),
        (
            {"alpha": {"schedule": "linear", "start": 1.2, "end": 0.5}},
            "alpha must be 0 or more and at most 1, and becomes 1.2",
        ),
        ({"alpha": "much"}, r"`objective.alpha`: input should be a valid number"),
        (
            {"alpha": {"balance": "fair"}},
            r"must be a number, or a section whose `schedule` or `balance` is one of 'linear'.*'ratio', 'uncertainty'",
        ),
        ({"alpha": {"balance": "ratio", "windw": 3}}, r"unknown key `objective.alpha.windw`; did you mean `window`\?"),
        ({"alpha": {"balance": "ratio", "start": 0.2}}, r"least \(0.5\) <= start \(0.2\) <= most \(0.9\) must hold"),
        ({"alpha": {"balance": "ratio", "low": 2}}, r"low \(2\) must be below high \(1.5\)"),
        ({"temperature": 0}, "temperature must be above 0 and at most 100, and becomes 0"),
        (
            {"temperature": {"schedule": "linear", "start": 4, "rate": 1}},
            "temperature must be above 0 and at most 100, and becomes 0",
        ),
        ({"temperature": {}}, r"`objective.temperature`: must be a number, or a section whose `schedule` is one of"),
        ({"temperature": 1000}, "temperature must be above 0 and at most 100, and becomes 1000"),
        ({"temperature": {"schedule": "linear", "start": 4}}, "a linear schedule has a rate or an end, one of them"),
        (
            {"temperature": {"schedule": "phases", "values": [5, 3, 1], "at": [0.5]}},
            "3 values need 2 fractions in `at`",
        ),
        ({"temperature": {"schedule": "phases", "values": [5, 3, 1], "at": [0.5, 0.2]}}, "fractions in `at` must rise"),
        ({"layers": [{"match": "angles", "weight": -1}]}, "a weight must be 0 or more, and becomes -1"),
        ({"layers": [{"match": "angles", "weight": 0}]}, "always 0 leaves nothing of its term"),
    ],
)
def test_numbers_that_cannot_be_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe({"cache": "c", "objective": section}, origin="r.yaml")


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ({"name": "a"}, r"`phases.0`: a phase has steps or a share of them, one of the two"),
        ({"name": "a", "share": 1, "mix": {"x": 0.5, "y": 0.4}}, "shares in mix add up to 0.9; they must add up to 1"),
        ({"name": "a", "share": 1, "mix": {"x": 1.5, "y": -0.5}}, "shares in mix must be there, and not be negative"),
        ({"name": "a", "share": 1, "alpha": {"balance": "ratio"}}, "a balance belongs into objective.alpha"),
        (
            {"name": "a", "share": 1, "temperatur": 2},
            r"unknown key `phases.0.temperatur`; did you mean `temperature`\?",
        ),
    ],
)
def test_phases_that_cannot_be_are_refused(phase: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe({"cache": "c", "phases": [phase]}, origin="r.yaml")


def test_phases_have_names_of_their_own() -> None:
    phases = [{"name": "a", "share": 0.5}, {"name": "a", "share": 0.5}]
    with pytest.raises(RecipeError, match="phases: two are called a; rename one"):
        parse_recipe({"cache": "c", "phases": phases}, origin="r.yaml")


def test_thirds_that_were_rounded_are_a_whole() -> None:
    schedule = schedule_of(*({"name": name, "share": 0.3333} for name in "abc"))
    assert [schedule.phase_at(step) for step in (39, 40, 79, 80, 119)] == ["a", "b", "b", "c", "c"]


def test_rules_of_two_phases_remember_apart() -> None:
    follow = {"schedule": "student-loss", "base": 3, "most": 6, "strength": 50}
    phases = [{"name": name, "steps": 60, "temperature": follow} for name in "ab"]
    one, other = schedule_of(*phases), schedule_of(*phases)
    for step, ce in [(0, 1.0), (1, 3.0), (60, 2.0), (61, 1.0)]:
        one.update(step, distillation=1.0, ce=ce)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    found = [one.at(step).temperature for step in (2, 62)]
    assert found == [other.at(step).temperature for step in (2, 62)] and len({3.0, *found}) == 3


@pytest.mark.parametrize(
    ("objective", "alphas", "message"),
    [
        ({"routing": {"task": [1]}}, [0, 0], "nothing is left of distillation; leave routing out"),
        ({"routing": {"task": [1]}}, [1, 1], "nothing is left of the task; leave routing out"),
        ({"routing": {"task": [1]}, "alpha": 1}, [0.5, None], None),
        ({"gradient_cosines": 5}, [1, 1], "nothing is left of the task; leave it out"),
        ({"alpha": {"balance": "ratio"}}, [0.5, 0.2], "follows the losses, and every phase sets its own alpha"),
        ({"alpha": {"balance": "ratio"}}, [0.5, None], None),
    ],
)
def test_what_needs_both_terms_is_judged_over_all_phases(
    objective: dict[str, Any], alphas: list[Any], message: str | None
) -> None:
    phases = [{"name": str(n), "share": 0.5, "alpha": alpha} for n, alpha in enumerate(alphas)]
    if message is None:
        schedule_of(*phases, **objective)
        return
    with pytest.raises(RecipeError, match=message):
        schedule_of(*phases, **objective)


def test_what_a_run_asks_of_its_cache_has_values_between_extremes() -> None:
    smooth = ScheduleRange.of(
        ObjectiveConfig.model_validate({"temperature": {"schedule": "cosine", "start": 5, "end": 1}})
    )
    assert {1.0, 5.0} <= set(smooth.temperatures) and len(smooth.temperatures) > 2
    steps = {"temperature": {"schedule": "phases", "values": [4, 2], "at": [0.5]}}
    assert ScheduleRange.of(ObjectiveConfig.model_validate(steps)).temperatures == (4.0, 2.0)
    assert ScheduleRange.of(ObjectiveConfig(alpha=0)) == ScheduleRange(False, ())
