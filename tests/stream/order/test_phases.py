"""Runs in phases: each with its caches, their shares and its batch; rows go on where they were."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teachercache.config import PhaseConfig
from teachercache.errors import RecipeError
from teachercache.stream.order.batch_plan import BatchPlan, PlanSampler
from teachercache.stream.order.mixture import Mixture
from teachercache.stream.order.phases import PhasedPlan
from teachercache.stream.order.shuffle_windows import RowOrder

NAMES = ["general", "domain"]


def order_of(rows: int, name: str) -> RowOrder:
    return RowOrder([rows], block_rows=[rows], block_bytes=[rows], fingerprint=name, seed=0)


def plan_of(
    *phases: dict[str, Any], steps: int, rows: tuple[int, ...] = (40, 24), world: int = 1, micro: int = 2
) -> PhasedPlan:
    orders = [order_of(count, name) for count, name in zip(rows, NAMES, strict=False)]
    base = BatchPlan(Mixture.of(orders, shares=[None] * (len(rows) - 1)), 8, 2, world)
    made = [PhaseConfig.model_validate(phase) for phase in phases]
    return PhasedPlan.of(base, made, names=NAMES[: len(rows)], steps=steps)


def rows_of(plan: PhasedPlan, steps: range, *, world: int = 1) -> list[int]:
    return [
        row for step in steps for rank in range(world) for part in plan.micro_batches(step, rank=rank) for row in part
    ]


def test_each_phase_has_its_caches_in_their_shares() -> None:
    plan = plan_of(
        {"name": "general", "steps": 5, "mix": {"general": 1.0}},
        {"name": "both", "steps": 4, "mix": {"general": 0.25, "domain": 0.75}},
        {"name": "domain", "steps": 3, "mix": {"domain": 1.0}},
        steps=12,
    )
    assert sorted(rows_of(plan, range(5))) == list(range(40))  # one pass: each row once
    both = rows_of(plan, range(5, 9))
    assert Counter(row >= 40 for row in both) == {True: 24, False: 8}
    assert all(row >= 40 for row in rows_of(plan, range(9, 12)))


def test_rows_go_on_where_the_phase_before_left_off() -> None:
    """Three phases of one cache, with other batches, visit every row once before any comes again."""
    plan = plan_of(
        {"name": "a", "steps": 2, "global_batch": 8},
        {"name": "b", "steps": 3, "global_batch": 4},
        {"name": "c", "steps": 3, "global_batch": 16},
        steps=8,
        rows=(40,),
    )
    assert [len(rows_of(plan, range(step, step + 1))) for step in range(8)] == [8, 8, 4, 4, 4, 16, 16, 8]
    seen = Counter(rows_of(plan, range(8)))
    assert sum(seen.values()) == plan.rows_before(8) == 68
    assert sorted(rows_of(plan, range(6)) + rows_of(plan, range(6, 7)))[:1] == [0]
    assert max(seen.values()) - min(seen.values()) <= 1


@settings(max_examples=40)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 6), st.sampled_from([2, 4, 6, 8, 12])), min_size=1, max_size=4),
    shares=st.lists(st.sampled_from([0.0, 0.2, 0.5, 1.0]), min_size=4, max_size=4),
    world=st.integers(1, 3),
)
def test_no_row_comes_twice_before_all_have_come_once(lengths: Any, shares: Any, world: int) -> None:
    phases = [
        {"name": str(n), "steps": steps, "global_batch": batch, "mix": {"general": share, "domain": 1 - share}}
        for n, ((steps, batch), share) in enumerate(zip(lengths, shares, strict=False))
    ]
    total = sum(steps for steps, _ in lengths)
    plan = plan_of(*phases, steps=total, world=world)
    rows = rows_of(plan, range(total), world=world)
    assert len(rows) == plan.rows_before(total)
    for own in (range(40), range(40, 64)):
        drawn = Counter(row for row in rows if row in own)
        assert not drawn or max(drawn.values()) - min(drawn.get(row, 0) for row in own) <= 1


def test_processes_see_together_what_one_sees() -> None:
    phases = [{"name": "a", "steps": 3, "global_batch": 12}, {"name": "b", "steps": 2, "global_batch": 4}]
    one, two = plan_of(*phases, steps=5), plan_of(*phases, steps=5, world=2)
    for step in range(5):
        here = range(step, step + 1)
        assert sorted(rows_of(two, here, world=2)) == sorted(rows_of(one, here))
        counts = {len(two.micro_batches(step, rank=rank)) for rank in range(2)}
        assert counts == {two.micro_steps_at(step)}
    assert two.micro_steps == max(two.micro_steps_at(step) for step in range(5)) > two.micro_steps_at(4)


def test_a_seek_into_any_phase_goes_on_there() -> None:
    plan = plan_of(
        {"name": "a", "steps": 3, "mix": {"general": 1}}, {"name": "b", "steps": 3, "mix": {"domain": 1}}, steps=6
    )
    whole = list(PlanSampler(plan, rank=0, steps=6, first_step=lambda: 0))
    for first in range(6):
        rest = list(PlanSampler(plan, rank=0, steps=6, first_step=lambda first=first: first))
        assert rest == whole[sum(plan.micro_steps_at(step) for step in range(first)) :]


def test_phases_fetch_the_caches_that_they_read() -> None:
    plan = plan_of(
        {"name": "a", "steps": 3, "mix": {"general": 1}}, {"name": "b", "steps": 3, "mix": {"domain": 1}}, steps=6
    )
    assert plan.shards_at(0) == [[0], []] and plan.shards_at(3) == [[], [0]]


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        (
            {"mix": {"medical": 1.0}},
            "mix names medical, and the run's caches are general, domain; add it to stream.mix",
        ),
        ({"global_batch": 5}, r"global_batch \(5\) must be a multiple of train.micro_batch \(2\)"),
    ],
)
def test_what_does_not_fit_is_refused(phase: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan_of({"name": "a", "steps": 4, **phase}, steps=4)
