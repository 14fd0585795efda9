"""Selection by groups is selection."""

from __future__ import annotations

import pytest
import torch

from teachercache.targets.coding.grouped_topk import largest

SIZES = [(vocabulary, k) for vocabulary in (1, 7, 64, 300, 4097, 49_152) for k in (1, 5, 12, 64) if k <= vocabulary]


@pytest.mark.parametrize(("vocabulary", "k"), SIZES)
def test_it_finds_what_a_sort_finds(vocabulary: int, k: int) -> None:
    values = torch.randn(9, vocabulary, generator=torch.Generator().manual_seed(k))
    values[3] = -torch.inf
    values[3, :2] = 0.5  # a teacher that rules out nearly all tokens
    found, ids = largest(torch, values, k)
    torch.testing.assert_close(found, values.topk(k)[0], rtol=0, atol=0)
    torch.testing.assert_close(values.gather(1, ids), found, rtol=0, atol=0)
    assert all(len(set(row)) == k for row in ids.tolist())


@pytest.mark.parametrize("place", [0, 2_000, 4_096])
def test_what_is_no_number_comes_first(place: int) -> None:
    values = torch.randn(2, 4_097)
    values[1, place] = torch.nan
    found, ids = largest(torch, values, 5)
    assert not found[0].isnan().any()
    assert found[1, 0].isnan()
    assert ids[1, 0] == place
