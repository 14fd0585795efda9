"""The batch plan: disjoint and complete for any number of processes, and the same rows in a step whatever they are."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from teachercache.stream.order.batch_plan import BatchPlan, PlanSampler, spread
from teachercache.stream.order.mixture import Mixture
from teachercache.stream.order.shuffle_windows import RowOrder

FEW = settings(deadline=None, max_examples=40)
SHARDS = st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(any)


def _order(shards: list[int], *, window: int = 64, seed: int = 0, block: int = 2) -> Mixture:
    return Mixture.of(
        [
            RowOrder(
                shards,
                block_rows=[block] * len(shards),
                block_bytes=[1] * len(shards),
                fingerprint="cache",
                seed=seed,
                window=window,
            )
        ]
    )


PLANS = st.builds(
    lambda shards, micro, per_step, world, window, seed: BatchPlan(
        _order(shards, window=window, seed=seed), micro * per_step, micro, world
    ),
    SHARDS,
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 9),
)


def _rows_of_processes(plan: BatchPlan, step: int) -> list[int]:
    return [row for rank in range(plan.world_size) for batch in plan.micro_batches(step, rank=rank) for row in batch]


@FEW
@given(plan=PLANS, epoch=st.integers(0, 3))
def test_an_epoch_visits_every_row_once(plan: BatchPlan, epoch: int) -> None:
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    seen = [row for step in steps for row in _rows_of_processes(plan, step)]
    assert sorted(seen) == list(range(plan.rows))


@FEW
@given(plan=PLANS, step=st.integers(0, 40), world=st.integers(1, 7), micro=st.integers(1, 8))
def test_a_step_has_the_same_rows_for_any_processes(plan: BatchPlan, step: int, world: int, micro: int) -> None:
    other = replace(plan, world_size=world, micro_batch=micro)
    assert sorted(_rows_of_processes(plan, step)) == sorted(_rows_of_processes(other, step))


@FEW
@given(plan=PLANS, step=st.integers(0, 40))
def test_all_processes_run_as_many_micro_batches(plan: BatchPlan, step: int) -> None:
    counts = {len(plan.micro_batches(step, rank=rank)) for rank in range(plan.world_size)}
    sizes = {len(batch) for rank in range(plan.world_size) for batch in plan.micro_batches(step, rank=rank)}
    assert counts == {plan.micro_steps}
    assert max(sizes) <= plan.micro_batch


@FEW
@given(plan=PLANS, first=st.integers(0, 12), rank=st.integers(0, 3))
def test_starting_late_is_a_seek(plan: BatchPlan, first: int, rank: int) -> None:
    rank %= plan.world_size
    steps = 12
    whole = list(PlanSampler(plan, rank=rank, steps=steps, first_step=lambda: 0))
    rest = PlanSampler(plan, rank=rank, steps=steps, first_step=lambda: first)
    assert list(rest) == whole[first * plan.micro_steps :]
    assert len(rest) == len(whole)  # a trainer that resumes still counts the whole run


def test_a_seek_computes_nothing_that_lies_before() -> None:
    plan = BatchPlan(_order([10**7] * 10**5, block=10**5), 64, 8, 2)
    far = 10**10  # walking there would take hours
    assert len(next(iter(PlanSampler(plan, rank=1, steps=far + 1, first_step=lambda: far)))) == 8


def test_epochs_become_steps() -> None:
    plan = BatchPlan(_order([100]), 16, 4, 1)
    assert plan.steps_per_epoch == 7
    assert [plan.steps(epochs) for epochs in (0.01, 0.5, 1, 1.5, 3)] == [1, 4, 7, 11, 21]
    assert replace(plan, order=_order([80])).steps(0.6) == 3  # 0.6 × 5 is 3, not 3.0000000000000004


@FEW
@given(rows=st.integers(0, 60), micro=st.integers(1, 8), world=st.integers(1, 5), start=st.integers(0, 9))
def test_held_out_rows_are_spread_evenly(rows: int, micro: int, world: int, start: int) -> None:
    shares = [spread(rows, start=start, micro_batch=micro, rank=rank, world_size=world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(row for share in shares for batch in share for row in batch) == list(range(start, start + rows))


@FEW
@given(
    shards=st.lists(SHARDS, min_size=2, max_size=4),
    share=st.one_of(st.none(), st.floats(0.05, 0.9)),
    micro=st.integers(1, 5),
    per_step=st.integers(1, 5),
    world=st.integers(1, 4),
    step=st.integers(0, 20),
)
def test_a_micro_batch_is_of_one_cache_and_none_is_lost(
    shards: list[list[int]], share: float | None, micro: int, per_step: int, world: int, step: int
) -> None:
    orders = [
        RowOrder(
            each, block_rows=[2] * len(each), block_bytes=[1] * len(each), fingerprint=str(number), seed=0, window=2
        )
        for number, each in enumerate(shards)
    ]
    mixture = Mixture.of(orders, shares=[share, *[None] * (len(orders) - 2)])
    plan = BatchPlan(mixture, micro * per_step, micro, world)
    batches = [batch for rank in range(world) for batch in plan.micro_batches(step, rank=rank)]
    assert all(len({mixture.locate(row)[0] for row in batch}) <= 1 for batch in batches)
    assert sorted(row for batch in batches for row in batch) == sorted(plan.step_rows(step).tolist())
    assert len(batches) == plan.micro_steps * world and max(len(batch) for batch in batches) <= micro
