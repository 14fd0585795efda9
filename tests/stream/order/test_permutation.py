"""The order of rows: a permutation for every key and size, that looks random and depends on all of its inputs."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teachercache.stream.order.permutation import BLOCK, order_key, permuted

FEW = settings(deadline=None, max_examples=40)
SIZES = st.one_of(st.integers(1, 40), st.integers(1, 5000))
SEEDS = st.integers(0, 2**31)
PUBLISHED = [141, 3507, 3519, 4055, 2605, 3081, 2687, 2495]


@FEW
@given(size=SIZES, seed=SEEDS, epoch=st.integers(0, 50))
def test_it_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    key = order_key("cache", seed=seed, epoch=epoch)
    assert sorted(permuted(np.arange(size), size=size, key=key)) == list(range(size))


@FEW
@given(size=SIZES, seed=SEEDS, data=st.data())
def test_it_is_computed_index_by_index(size: int, seed: int, data: st.DataObject) -> None:
    key = order_key("cache", seed=seed, epoch=0)
    chosen = data.draw(st.lists(st.integers(0, size - 1), max_size=5))
    everything = permuted(np.arange(size), size=size, key=key)
    assert permuted(np.array(chosen, dtype=np.int64), size=size, key=key).tolist() == everything[chosen].tolist()


@FEW
@given(size=st.integers(1, 9 * BLOCK), seed=SEEDS, data=st.data())
def test_a_batch_is_a_piece_of_the_whole_order(size: int, seed: int, data: st.DataObject) -> None:
    key = order_key("cache", seed=seed, epoch=0)
    everything = permuted(np.arange(size), size=size, key=key)
    start = data.draw(st.integers(0, size - 1))
    index_N = np.arange(start, min(size, start + data.draw(st.integers(0, 3 * BLOCK))))
    assert permuted(index_N, size=size, key=key).tolist() == everything[index_N].tolist()


def test_the_order_is_the_published_one() -> None:
    """Runs that were begun by an earlier version go on in the same order."""
    order = permuted(np.arange(2000, 2008), size=5000, key=order_key("cache", seed=3, epoch=1))
    assert order.tolist() == PUBLISHED


@FEW
@given(size=st.integers(30, 5000), seed=SEEDS, epoch=st.integers(0, 50))
def test_seed_epoch_and_cache_change_it(size: int, seed: int, epoch: int) -> None:
    keys = [
        order_key("cache", seed=seed, epoch=epoch),
        order_key("cache", seed=seed, epoch=epoch + 1),
        order_key("cache", seed=seed + 1, epoch=epoch),
        order_key("other", seed=seed, epoch=epoch),
    ]
    orders = {tuple(permuted(np.arange(size), size=size, key=key)) for key in keys}
    assert len(orders) == len(keys)


def test_every_order_of_four_is_as_likely() -> None:
    draws = 2400
    counts = Counter(tuple(permuted(np.arange(4), size=4, key=order_key("c", seed=s, epoch=0))) for s in range(draws))
    expected = draws / 24
    assert len(counts) == 24
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < 49.7  # 23 degrees of freedom, p = 0.001; the draws are fixed


def test_neighbours_part() -> None:
    size = 20_000
    order = permuted(np.arange(size), size=size, key=order_key("c", seed=1, epoch=0))
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.03
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.03


def test_a_huge_size_needs_no_table() -> None:
    size = 10**15
    assert permuted(np.array([0, size - 1]), size=size, key=b"k").max() < size


@pytest.mark.parametrize("index", [-1, 5])
def test_an_index_outside_is_refused(index: int) -> None:
    with pytest.raises(IndexError, match="0 … 4"):
        permuted(np.array([index]), size=5, key=b"k")
