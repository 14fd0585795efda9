"""Targets of kind top-p against their naive twins in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teachercache.errors import CacheDamaged, CacheError, RecipeError
from teachercache.targets import TopP, target_kind

from target_kinds import as_tensors, log_softmax, random_logits, stored_arrays, stored_columns, walk_through_a_cache

GRID = (1.0, 2.0, 4.0)
V = 40


def naive_head(log_prob_V: np.ndarray, p: float, k: int) -> list[int]:
    head, mass = [], 0.0
    for token in np.argsort(-log_prob_V)[:k]:
        head.append(int(token))
        mass += np.exp(log_prob_V[token])
        if mass >= p:
            break
    return head


@settings(max_examples=25, deadline=None)
@given(p=st.sampled_from([0.05, 0.5, 0.9, 0.999]), k=st.integers(1, V), seed=st.integers(0, 99))
def test_heads_are_the_smallest_that_reach_p(p: float, k: int, seed: int) -> None:
    z = random_logits(12, V, seed=seed)
    columns = stored_columns(TopP(k, GRID, "float32", V, p), z)
    expected = [naive_head(row, p, k) for row in log_softmax(z, 1.0)]
    assert columns["head_sizes"].tolist() == [len(head) for head in expected]
    assert columns["head_ids"].tolist() == [token for head in expected for token in head]


@pytest.mark.parametrize("temperature", GRID)
@pytest.mark.parametrize(("p", "k"), [(0.7, 10), (0.95, V - 1), (1.0, 12), (0.01, 5)])
def test_softened_distribution_equals_the_dense_softmax(p: float, k: int, temperature: float) -> None:
    z = random_logits(30, V)
    kind = TopP(k, GRID, "float32", V, p)
    arrays = stored_arrays(kind, z)
    exact = log_softmax(z, temperature)
    dense = kind.softened(arrays, temperature, tail="uniform").dense()
    heads = [naive_head(row, p, k) for row in log_softmax(z, 1.0)]
    for ours, row, head in zip(dense, exact, heads, strict=True):
        others = [token for token in range(V) if token not in head]
        np.testing.assert_allclose(ours[head], row[head], atol=3e-5)
        np.testing.assert_allclose(np.exp(ours[others]).sum(), np.exp(row[others]).sum(), atol=1e-5)
        assert np.ptp(ours[others]) < 1e-5
    in_torch = kind.softened(as_tensors(arrays), temperature, tail="uniform", xp=torch)
    np.testing.assert_allclose(in_torch.dense().numpy(), dense, atol=1e-5)


def test_renormalised_heads_have_mass_one() -> None:
    kind = TopP(8, GRID, "float16", V, 0.8)
    softened = kind.softened(stored_arrays(kind, random_logits(20, V)), 2.0, tail="renormalise")
    np.testing.assert_allclose(np.exp(softened.head_log_prob_Nk).sum(-1), 1, atol=1e-6)


def test_ruled_out_tokens_are_never_in_a_head() -> None:
    z = random_logits(4, V)
    z[:, 3:] = -torch.inf
    columns = stored_columns(TopP(V, GRID, "float32", V, 1.0), z)
    assert (columns["head_sizes"] <= 3).all() and (columns["head_ids"] < 3).all()
    assert np.isneginf(columns["tail_log_partition"][columns["head_sizes"] == 3]).all()


def test_a_sure_teacher_costs_one_token() -> None:
    z = torch.zeros(6, V)
    z[:, 5] = 20.0
    columns = stored_columns(TopP(V, GRID, "float16", V, 0.99), z)
    assert columns["head_sizes"].tolist() == [1] * 6 and columns["head_ids"].tolist() == [5] * 6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_unusable(bad: float) -> None:
    z = random_logits(5, V)
    z[3, 7] = bad
    kind = TopP(4, GRID, "float16", V, 0.9)
    captured = kind.capture(torch, z, torch.zeros(5, dtype=torch.int64))
    assert kind.is_usable(captured).tolist() == [True, True, True, False, True]


def test_sizes_that_do_not_fit_are_damaged() -> None:
    kind = TopP(4, GRID, "float16", V, 0.9)
    columns = stored_columns(kind, random_logits(6, V))
    with pytest.raises(CacheDamaged, match="a row has .* tokens, its sizes add up to"):
        kind.decoded({**columns, "head_ids": columns["head_ids"][:-1]})
    with pytest.raises(CacheDamaged, match="between 1 and 4 are possible"):
        kind.decoded({**columns, "head_sizes": columns["head_sizes"] + 4})


def test_refusals_name_the_remedy() -> None:
    kind = TopP(4, GRID, "float16", V, 0.9)
    with pytest.raises(CacheError, match="targets of kind top-p hold no sketch of the tail"):
        kind.objective_columns("sketch")
    with pytest.raises(CacheError, match=r"not on this cache's grid \(1, 2, 4\)"):
        kind.check_temperature(3.0)
    with pytest.raises(RecipeError, match="use k <= 40"):
        target_kind({**kind.settings(), "k": 41}, vocabulary_size=V)
    assert target_kind(kind.settings(), vocabulary_size=V) == kind


@pytest.mark.parametrize("tail", ["ghost", "uniform", "renormalise"])
def test_a_whole_cache(tmp_path: Path, tail: str) -> None:
    cache, _ = walk_through_a_cache(tmp_path, {"kind": "top-p", "p": 0.12, "k": 40}, temperature=2.0, tail=tail)
    sizes = np.concatenate([cache.read_row("train", i, columns=["head_sizes"]).targets["head_sizes"] for i in range(9)])
    assert sizes.min() < sizes.max() <= 40
    assert cache.manifest.fidelity["tail"] == "uniform"
