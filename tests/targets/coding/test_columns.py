"""Codecs of payload columns: what is read is what was written, and damage is named."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teachercache.errors import CacheDamaged
from teachercache.targets import Column
from teachercache.targets.coding.columns import MOST_ROW_BYTES, check_row_bytes
from teachercache.targets.coding.pco import NAME as PCO


def read_back(column: Column, arrays: list[np.ndarray], positions: list[int]) -> list[np.ndarray]:
    tables, pages = column.encode(arrays)
    decode = Column.from_metadata("c", column.to_metadata()).decoder(tables)
    return [decode(page, count) for page, count in zip(pages, positions, strict=True)]


@settings(max_examples=50, deadline=None)
@given(
    positions=st.lists(st.integers(0, 7), max_size=3),
    shape=st.lists(st.integers(1, 4), max_size=2),
    dtype=st.sampled_from(["<u2", "<u4", "<f2", "<f4"]),
)
def test_plain_columns_round_trip(positions: list[int], shape: list[int], dtype: str) -> None:
    column = Column("c", dtype, tuple(shape))
    arrays = [np.random.default_rng(0).integers(0, 999, (count, *shape)).astype(dtype) for count in positions]
    for again, values in zip(read_back(column, arrays, positions), arrays, strict=True):
        np.testing.assert_array_equal(again, values)
        assert again.dtype == np.dtype(dtype)


@settings(max_examples=60, deadline=None)
@given(
    positions=st.lists(st.integers(0, 150), max_size=4),
    groups=st.lists(st.integers(1, 5), max_size=3),
    every=st.sampled_from([1, 64]),
    dtype=st.sampled_from(["<i2", "<u2", "<i4", "<u4"]),
    spread=st.sampled_from([0.1, 3, 1e4, 1e9]),
    seed=st.integers(0, 99),
)
def test_entropy_coded_columns_round_trip(
    positions: list[int], groups: list[int], every: int, dtype: str, spread: float, seed: int
) -> None:
    column = Column("c", dtype, (sum(groups),), PCO, every=every, groups=tuple(groups))
    limits, generator = np.iinfo(dtype), np.random.default_rng(seed)
    arrays = [
        np.clip(generator.normal(0, spread, (column.entries(count), sum(groups))), limits.min, limits.max).astype(dtype)
        for count in positions
    ]
    for again, values in zip(read_back(column, arrays, positions), arrays, strict=True):
        np.testing.assert_array_equal(again, values)


@pytest.mark.parametrize(
    "column",
    [
        Column("c", "<f2", (3,)),
        Column("c", "<f2", (3,), ragged=True),
        Column("c", "<i4", (3,), PCO, groups=(1, 2)),
        Column("c", "<i4", (3,), PCO, groups=(3,), every=64),
        Column("c", "<u2", (2,), PCO, groups=(2,), ragged=True),
    ],
)
def test_what_a_row_takes_is_known_before_it_is_decoded(column: Column) -> None:
    positions = 130
    entries = 77 if column.ragged else column.entries(positions)
    values = np.ones((entries, *column.shape), column.dtype)
    _, [page] = column.encode([values])
    assert column.decoded_bytes(page, positions) == values.nbytes


def test_columns_that_together_claim_more_than_a_row_has_are_refused() -> None:
    column = Column("c", "<i4", (2**16,), PCO, groups=(2**16,))
    claim = column.decoded_bytes(b"", 1500)  # of zeros, which take no bytes
    assert check_row_bytes([claim, claim]) == 2 * claim < MOST_ROW_BYTES
    with pytest.raises(CacheDamaged, match=r"a row claims \d+ bytes, at most 1073741824 are possible"):
        check_row_bytes([claim, claim], before=claim)


def test_a_row_is_read_without_its_neighbours() -> None:
    column = Column("c", "<i2", (3,), PCO, groups=(1, 2))
    arrays = [np.full((count, 3), count, dtype=np.int16) for count in (300, 7, 1)]
    tables, pages = column.encode(arrays)
    np.testing.assert_array_equal(column.decoder(tables)(pages[1], 7), arrays[1])


def test_groups_cost_near_their_entropy() -> None:
    generator = np.random.default_rng(0)
    spreads = np.array([8.0] * 4 + [1.0] * 16 + [0.2] * 64)
    rows = [np.rint(generator.normal(0, spreads, (256, 84))).astype(np.int16) for _ in range(32)]
    together = np.concatenate(rows)
    bits = sum(_entropy(together[:, index]) for index in range(84))
    _, pages = Column("c", "<i2", (84,), PCO, groups=(4, 16, 64)).encode(rows)
    assert sum(map(len, pages)) / len(together) < 1.06 * bits / 8


def _entropy(values: np.ndarray) -> float:
    shares = np.unique(values, return_counts=True)[1] / len(values)
    return float(-(shares * np.log2(shares)).sum())


def test_columns_of_the_wrong_size_or_codec_are_damaged() -> None:
    column = Column("c", "<f2", (2,))
    with pytest.raises(CacheDamaged, match="7 bytes for 2 positions of 4 bytes"):
        column.decoder()(b"1234567", 2)
    with pytest.raises(CacheDamaged, match="coded as 'future/9'"):
        Column.from_metadata("c", {"codec": "future/9", "dtype": "<f2", "shape": []})


def test_damaged_entropy_coded_rows_are_named() -> None:
    column = Column("codes", "<i2", (4,), PCO, groups=(2, 2))
    tables, (page,) = column.encode([np.arange(400, dtype=np.int16).reshape(100, 4)])
    decode = column.decoder(tables)
    with pytest.raises(CacheDamaged, match="column codes"):
        decode(page[: len(page) // 2], 100)
    with pytest.raises(CacheDamaged, match="column codes"):
        decode(page + b"more", 100)
    with pytest.raises(CacheDamaged, match="its tables cannot be read"):
        column.decoder(b"\x04\x00\x00\x00junk")
    lengths = [len(tables[:end]) for end in range(0, len(tables), 7)]
    for _, end in pairwise(lengths):  # a table cut anywhere is refused, never read past its end
        with pytest.raises(CacheDamaged):
            column.decoder(tables[:end])(page, 100)


@settings(max_examples=40, deadline=None)
@given(entries=st.lists(st.integers(0, 50), max_size=4), coded=st.booleans(), shape=st.sampled_from([(), (3,)]))
def test_ragged_columns_round_trip(entries: list[int], coded: bool, shape: tuple[int, ...]) -> None:
    groups = (3,) if shape else (1,)
    column = (
        Column("c", "<u2", shape, PCO, groups=groups, ragged=True) if coded else Column("c", "<u2", shape, ragged=True)
    )
    arrays = [np.random.default_rng(0).integers(0, 99, (count, *shape)).astype("<u2") for count in entries]
    for again, values in zip(read_back(column, arrays, [7] * len(arrays)), arrays, strict=True):
        np.testing.assert_array_equal(again, values)


def test_damaged_ragged_rows_are_named() -> None:
    with pytest.raises(CacheDamaged, match="column c: 7 bytes"):
        Column("c", "<f4", ragged=True).decoder()(b"1234567", 2)
    column = Column("c", "<u2", (), PCO, groups=(1,), ragged=True)
    tables, (page,) = column.encode([np.arange(30, dtype=np.uint16)])
    for data in (page[:3], page[:9], page + b"x", b"\xff\xff\0\0" + page[4:]):
        with pytest.raises(CacheDamaged, match="column c"):
            column.decoder(tables)(data, 5)


def test_more_values_than_one_table_takes_are_cut_up() -> None:
    column = Column("codes", "<i2", (70,), PCO, groups=(1, 69))
    rows = [np.zeros((150_000, 70), dtype=np.int16), np.arange(150_000 * 70, dtype=np.int64).reshape(-1, 70) % 7]
    tables, pages = column.encode([values.astype(np.int16) for values in rows])
    assert 69 * 300_000 > 2**24
    np.testing.assert_array_equal(column.decoder(tables)(pages[1], 150_000), rows[1])
