"""Targets of kind random-sampling: unbiased where they are drawn, and the same whatever they run with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from teachercache.cache import Cache
from teachercache.config import ObjectiveConfig
from teachercache.errors import CacheError
from teachercache.objective import DistillationObjective
from teachercache.objective.logits.student_output import StudentOutput
from teachercache.targets import RandomSampling, target_kind
from teachercache.targets.coding.counter_rng import position_seeds, uniforms

from builders import sentences, tiny_cache, tiny_teacher
from target_kinds import as_tensors, log_softmax, random_logits, stored_arrays, stored_columns, walk_through_a_cache

V = 30


def estimates(kind: RandomSampling, z: torch.Tensor, temperature: float, *, row: str = "row") -> np.ndarray:
    arrays = stored_arrays(kind, z, seeds_N=position_seeds(row, len(z)))
    softened = kind.softened(arrays, temperature)
    dense = np.zeros((len(z), V))
    np.add.at(dense, (np.arange(len(z))[:, None], softened.head_ids_Nk), np.exp(softened.head_log_prob_Nk))
    return dense


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_estimate_is_unbiased_where_it_is_drawn(temperature: float) -> None:
    """20,000 positions of one distribution: Pearson's chi-squared of all counts, refused at one in a million (seeded)."""
    z = random_logits(1, V, scale=1.5).expand(20_000, V)
    kind = RandomSampling(10, temperature, V)
    exact = np.exp(log_softmax(z[:1], temperature)[0])
    observed, expected = estimates(kind, z, temperature).sum(0) * 10, exact * len(z) * 10
    statistic = float(((observed - expected) ** 2 / expected).sum())
    freedom = V - 1
    # Wilson-Hilferty: the cube root of a chi-squared number over its degrees of freedom is nearly normal.
    limit = freedom * (1 - 2 / (9 * freedom) + 4.75 * np.sqrt(2 / (9 * freedom))) ** 3
    assert expected.min() > 5 and statistic < limit


def test_elsewhere_it_is_biased_as_stated() -> None:
    z = random_logits(1, V, scale=1.5).expand(4000, V)
    exact = np.exp(log_softmax(z[:1], 4.0)[0])
    drawn_there = np.abs(estimates(RandomSampling(10, 4.0, V), z, 4.0).mean(0) - exact).sum()
    drawn_at_one = np.abs(estimates(RandomSampling(10, 1.0, V), z, 4.0).mean(0) - exact).sum()
    assert drawn_there < 0.05 < drawn_at_one


def test_counts_sum_up_to_the_draws_and_ids_are_distinct() -> None:
    kind = RandomSampling(50, 1.0, V)
    columns = stored_columns(kind, random_logits(40, V), seeds_N=position_seeds("row", 40))
    arrays = kind.decoded(columns)
    for size, ids, counts in zip(columns["sample_sizes"], arrays["sample_ids"], arrays["sample_counts"], strict=True):
        assert counts.sum() == 50 and counts[:size].min() >= 1 and not counts[size:].any()
        assert len(set(ids[:size])) == size and (ids[size:] == ids[0]).all() and ids.max() < V


def test_tokens_of_probability_zero_are_never_drawn() -> None:
    z = random_logits(200, V)
    z[:, ::2] = -torch.inf
    arrays = stored_arrays(RandomSampling(50, 3.0, V), z, seeds_N=position_seeds("row", 200))
    assert (arrays["sample_ids"] % 2 == 1).all()


def test_seeds_belong_to_the_row_and_the_place_in_it() -> None:
    np.testing.assert_array_equal(position_seeds("a", 9)[:4], position_seeds("a", 4))
    numbers = np.concatenate([uniforms(position_seeds(row, 50), 40).ravel() for row in ("a", "b")])
    assert len(np.unique(numbers)) == len(numbers) and numbers.min() > 0 and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.02 and abs(numbers.var() - 1 / 12) < 0.005


def test_equal_rows_give_equal_shards_whatever_their_batches(tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path / "teacher")
    caches = [
        Cache.open(
            tiny_cache(
                tmp_path / str(size), teacher=teacher, texts=sentences(20), precompute={"positions_per_batch": size},
                targets={"logits": {"kind": "random-sampling", "draws": 20}},
            )
        )
        for size in (64, 1024)
    ]  # fmt: skip
    assert caches[0].manifest.fingerprint == caches[1].manifest.fingerprint
    for index in range(caches[0].rows_of("train")):
        one, other = (cache.read_row("train", index).targets for cache in caches)
        np.testing.assert_array_equal(one["sample_gaps"], other["sample_gaps"])
        np.testing.assert_array_equal(one["sample_counts"], other["sample_counts"])


def test_the_gradient_is_unbiased() -> None:
    """Averaged over 20,000 samples, the loss's gradient is that of the whole teacher, within 5 standard errors."""
    kind, count = RandomSampling(5, 1.0, V), 20_000
    z = random_logits(1, V, scale=1.5).expand(count, V)
    arrays = as_tensors(stored_arrays(kind, z, seeds_N=position_seeds("row", count)))
    objective = DistillationObjective(ObjectiveConfig(alpha=1.0), kind=kind)
    student = random_logits(1, V, seed=5, scale=1.0)
    logits = student.expand(1, count, V).clone().requires_grad_()
    objective(StudentOutput.of_logits(logits), torch.zeros(1, count, dtype=torch.int64), arrays).total.backward()
    assert logits.grad is not None
    exact = (torch.softmax(student, -1) - torch.softmax(z[:1], -1))[0]
    error = (logits.grad[0].mean(0) - exact).abs() / (logits.grad[0].std(0) / count**0.5)
    assert error.max() < 5


def test_refusals_name_the_remedy() -> None:
    kind = RandomSampling(5, 1.0, V)
    assert target_kind(kind.settings(), vocabulary_size=V) == kind
    with pytest.raises(CacheError, match="use renormalise or auto"):
        kind.objective_columns("ghost")
    with pytest.raises(CacheError, match="reverse-kl is infinite against targets of kind random-sampling"):
        DistillationObjective(ObjectiveConfig(divergence="reverse-kl"), kind=kind)
    with pytest.raises(CacheError, match="use T > 0"):
        kind.check_temperature(0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_unusable(bad: float) -> None:
    z, kind = random_logits(5, V), RandomSampling(5, 1.0, V)
    z[3, 7] = bad
    captured = kind.capture(torch, z, torch.zeros(5, dtype=torch.int64), None, position_seeds("row", 5))
    assert kind.is_usable(captured).tolist() == [True, True, True, False, True]


def test_a_whole_cache(tmp_path: Path) -> None:
    cache, _ = walk_through_a_cache(tmp_path, {"kind": "random-sampling"})
    assert cache.manifest.fidelity == {}  # nothing to measure: a sample rules out what was not drawn
