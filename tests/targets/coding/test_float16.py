"""Every float16 there is, against numpy."""

from __future__ import annotations

import numpy as np

from teachercache.targets.coding.float16 import float32_of


def test_all_numbers_are_those_that_astype_gives() -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    assert len(finite) == 2**16 - 2**11
    np.testing.assert_array_equal(float32_of(finite).view(np.uint32), finite.astype(np.float32).view(np.uint32))


def test_infinities_stay() -> None:
    values = np.array([[1.5, -np.inf], [np.inf, -0.0]], dtype=np.float16)
    np.testing.assert_array_equal(float32_of(values), values.astype(np.float32))
    assert np.signbit(float32_of(values)[1, 1])


def test_what_is_float32_or_empty_comes_back() -> None:
    values = np.array([1.25, -3.0], dtype=np.float32)
    assert float32_of(values) is values or np.shares_memory(float32_of(values), values)
    assert float32_of(np.empty((0, 3), dtype=np.float16)).shape == (0, 3)
