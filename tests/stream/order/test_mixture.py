"""Caches in stated shares: dealt evenly, reproducible, each row of a cache once before any comes again."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teachercache.errors import RecipeError
from teachercache.stream.order.mixture import Mixture
from teachercache.stream.order.shuffle_windows import RowOrder

FEW = settings(deadline=None, max_examples=60)
SHARDS = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any)
MIXTURES = st.builds(
    lambda shards, shares: Mixture.of(
        [
            RowOrder(
                each, block_rows=[2] * len(each), block_bytes=[1] * len(each), fingerprint=str(number), seed=0, window=2
            )
            for number, each in enumerate(shards)
        ],
        shares=[shares[number] for number in range(len(shards) - 1)],
    ),
    st.lists(SHARDS, min_size=1, max_size=4),
    st.lists(st.one_of(st.none(), st.floats(0.02, 0.3)), min_size=3, max_size=3),
)


def _dealt(mixture: Mixture, epoch: int) -> list[tuple[int, int]]:
    return [mixture.locate(row) for row in mixture.rows_at(epoch, np.arange(mixture.rows)).tolist()]


@FEW
@given(mixture=MIXTURES, epoch=st.integers(0, 3))
def test_an_epoch_is_one_pass_over_the_first_cache(mixture: Mixture, epoch: int) -> None:
    dealt = _dealt(mixture, epoch)
    assert sorted(row for source, row in dealt if source == 0) == list(range(mixture.orders[0].rows))
    assert [sum(source == number for source, _ in dealt) for number in range(len(mixture.orders))] == list(
        mixture.draws
    )


@FEW
@given(mixture=MIXTURES)
def test_each_row_of_a_cache_comes_once_before_any_comes_again(mixture: Mixture) -> None:
    drawn = [pair for epoch in range(3) for pair in _dealt(mixture, epoch)]
    for number, order in enumerate(mixture.orders):
        counts = Counter(row for source, row in drawn if source == number)
        total = sum(counts.values())
        expected = {total // order.rows, -(-total // order.rows)}
        assert {counts[row] for row in range(order.rows)} <= expected


@FEW
@given(mixture=MIXTURES)
def test_any_part_of_an_epoch_has_the_shares_of_the_whole(mixture: Mixture) -> None:
    counts = np.zeros(len(mixture.orders))
    shares = np.array(mixture.draws) / mixture.rows
    for seen, (source, _) in enumerate(_dealt(mixture, 0), start=1):
        counts[source] += 1
        assert np.abs(counts - shares * seen).max() < len(mixture.orders)


@FEW
@given(mixture=MIXTURES, data=st.data())
def test_any_row_is_found_without_the_others(mixture: Mixture, data: st.DataObject) -> None:
    whole = mixture.rows_at(2, np.arange(mixture.rows))
    index = data.draw(st.integers(0, mixture.rows - 1))
    assert mixture.rows_at(2, np.array([index])) == whole[index]
    source, row = mixture.locate(int(whole[index]))
    ends = np.cumsum(mixture.orders[source].shard_rows_S)
    assert int(np.searchsorted(ends, row, side="right")) in mixture.shards_at(2, index)[source]


def _mixture(rows: list[int], shares: list[float | None]) -> Mixture:
    orders = [
        RowOrder([count], block_rows=[count // 1000 + 1], block_bytes=[1], fingerprint=str(number), seed=0)
        for number, count in enumerate(rows)
    ]
    return Mixture.of(orders, shares=shares)


def test_shares_are_of_the_rows_in_training() -> None:
    assert _mixture([70, 500], [0.3]).draws == (70, 30)
    assert _mixture([70, 5], [0.3]).draws == (70, 30)  # six times round
    assert _mixture([60, 30, 1000], [None, 0.1]).draws == (60, 30, 10)
    assert _mixture([60, 30], [None]).draws == (60, 30)


def test_shares_that_leave_nothing_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"stream.mix: shares add up to 1.1 .* below 1"):
        _mixture([10, 10, 10], [0.6, 0.5])


def test_a_seek_into_a_large_mixture_computes_nothing_that_lies_before() -> None:
    mixture = _mixture([10**12, 10**11], [None])
    far = 10**12
    rows = mixture.rows_at(3, np.arange(far, far + 64))
    assert 50 <= sum(mixture.locate(row)[0] == 0 for row in rows.tolist()) <= 60
