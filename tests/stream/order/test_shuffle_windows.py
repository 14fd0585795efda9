"""Shard-aware shuffling: every row once an epoch, few shards at a time, and no row needs those before it."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teachercache.stream.order.permutation import order_key, permuted
from teachercache.stream.order.shuffle_windows import RowOrder

GROUP = 96  # blocks
FEW = settings(deadline=None, max_examples=60)
SHARDS = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


def row_order(shards: list[int], *, block: int = 3, **settings: Any) -> RowOrder:
    settings = {"group_bytes": GROUP, **settings}
    return RowOrder(
        shards, block_rows=[block] * len(shards), block_bytes=[1] * len(shards), fingerprint="cache", **settings
    )


def _epoch(order: RowOrder, epoch: int) -> list[int]:
    return order.rows_at(epoch, np.arange(order.rows)).tolist()


def _shards_of(order: RowOrder, rows: list[int]) -> list[int]:
    return np.searchsorted(np.cumsum(order.shard_rows_S), rows, side="right").tolist()


@FEW
@given(shards=SHARDS, window=st.integers(1, 14), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_an_epoch_is_every_row_once(shards: list[int], window: int, seed: int, epoch: int) -> None:
    order = row_order(shards, seed=seed, window=window)
    assert sorted(_epoch(order, epoch)) == list(range(sum(shards)))


@FEW
@given(shards=SHARDS, window=st.integers(1, 14), epoch=st.integers(0, 3))
def test_a_window_is_all_that_is_open(shards: list[int], window: int, epoch: int) -> None:
    """Shards come in disjoint groups of at most `window`, and `shards_at` names them before they are read."""
    order = row_order(shards, seed=0, window=window)
    met = _shards_of(order, _epoch(order, epoch))
    groups = [set(order.shards_at(epoch, index)[0]) for index in range(order.rows)]
    assert all(shard in group for shard, group in zip(met, groups, strict=True))
    distinct = [group for index, group in enumerate(groups) if not index or group != groups[index - 1]]
    assert sum(len(group) for group in distinct) == len(set().union(*distinct))
    assert set(order.shards_at(epoch, order.rows - 1)[1]) <= set(order.shards_at(epoch + 1, 0)[0]) | set(
        np.flatnonzero(np.array(shards) == 0).tolist()
    )
    for group, following in itertools.pairwise(distinct):  # but for windows of empty shards
        index = groups.index(group)
        named = set(order.shards_at(epoch, index)[1])
        assert named == following or not any(shards[shard] for shard in named)


@FEW
@given(
    shards=st.lists(st.integers(0, 400), min_size=1, max_size=6).filter(any),
    window=st.integers(1, 7),
    block=st.integers(1, 5),
    epoch=st.integers(0, 2),
)
def test_few_blocks_are_open_at_a_time(shards: list[int], window: int, block: int, epoch: int) -> None:
    """From the first row of a block to its last one, no more rows pass than `GROUP` blocks hold."""
    order = row_order(shards, block=block, seed=0, window=window)
    starts = np.cumsum(shards) - shards
    rows = _epoch(order, epoch)
    assert sorted(rows) == list(range(sum(shards)))
    of_block: dict[tuple[int, int], list[int]] = {}
    for place, (row, shard) in enumerate(zip(rows, _shards_of(order, rows), strict=True)):
        of_block.setdefault((shard, (row - int(starts[shard])) // block), []).append(place)
    assert max(places[-1] - places[0] for places in of_block.values()) < GROUP * block


@FEW
@given(shards=SHARDS, window=st.integers(1, 14), data=st.data())
def test_any_row_is_found_without_the_others(shards: list[int], window: int, data: st.DataObject) -> None:
    order = row_order(shards, seed=0, window=window)
    whole = _epoch(order, 1)
    chosen = data.draw(st.lists(st.integers(0, order.rows - 1), max_size=8))
    fresh = pickle.loads(pickle.dumps(order))
    assert fresh.rows_at(1, np.array(chosen, dtype=np.int64)).tolist() == [whole[index] for index in chosen]


def test_epochs_and_seeds_differ_also_in_which_shards_meet() -> None:
    orders = [row_order([4] * 40, seed=seed, window=4) for seed in (0, 1)]
    firsts = [frozenset(order.shards_at(epoch, 0)[0]) for order in orders for epoch in (0, 1, 2)]
    assert len(set(firsts)) == 6
    assert len({tuple(_epoch(order, epoch)) for order in orders for epoch in (0, 1, 2)}) == 6


def test_a_cache_of_one_group_is_shuffled_as_a_whole() -> None:
    order = row_order([5, 7, 3], seed=2, window=3)
    key = order_key("cache", seed=2, epoch=1)
    assert _epoch(order, 1) == permuted(np.arange(15), size=15, key=key).tolist()


def test_neighbours_in_a_shard_are_spread_over_their_window() -> None:
    order = row_order([50] * 20, seed=0, window=5)  # 85 blocks a window
    place = np.argsort(_epoch(order, 0))
    gaps = np.abs(np.diff(place.reshape(20, 50), axis=1))
    assert 60 < gaps.mean() < 110  # of two independent places among 250: 83


def test_numbers_outside_of_an_epoch_are_refused() -> None:
    order = row_order([3, 4], seed=0)
    for index in (-1, 7):
        with pytest.raises(IndexError, match="0 … 6"):
            order.rows_at(0, np.array([index]))
