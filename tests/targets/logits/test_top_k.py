"""Targets of kind top-k against their naive twins in float64."""

import numpy as np
import pytest
import torch

from teachercache.errors import CacheError, RecipeError
from teachercache.targets import TopK, target_kind
from teachercache.targets.logits.temperature import softened


def logits(positions: int, vocabulary: int, *, seed: int = 0, scale: float = 4.0) -> torch.Tensor:
    return torch.randn(positions, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def capture(logits_NV: torch.Tensor, *, k: int, temperatures=(1.0, 2.0, 4.0, 8.0), dtype="float32", vocabulary=None):
    kind = TopK(k, temperatures, dtype, vocabulary or logits_NV.shape[1])
    labels_N = torch.arange(len(logits_NV)) % kind.vocabulary_size
    return kind, kind.capture(torch, logits_NV.clone(), labels_N), labels_N


@pytest.mark.parametrize("temperatures", [(1.0, 2.0, 4.0, 8.0), (1.0, 1.5, 3.0), (0.5, 1.0), (1.0,)])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_softened_distribution_equals_the_dense_softmax(k, temperatures):
    z = logits(30, 40)
    kind, columns, _ = capture(z, k=k, temperatures=temperatures)
    for temperature in temperatures:
        dense = torch.log_softmax(z.double() / temperature, -1)
        head, tail = softened(columns["head_logits"], columns["tail_log_partition"], kind.temperatures, temperature)
        ids = columns["head_ids"].astype(np.int64)
        np.testing.assert_allclose(head, dense.gather(1, torch.from_numpy(ids)).numpy(), atol=3e-6)
        outside = dense.exp().numpy()
        np.put_along_axis(outside, ids, 0.0, axis=1)
        np.testing.assert_allclose(np.exp(tail), outside.sum(-1), atol=3e-6)


def test_actual_log_prob_is_that_of_the_label():
    z = logits(20, 50)
    _, columns, labels_N = capture(z, k=3)
    expected = torch.log_softmax(z.double(), -1).gather(1, labels_N[:, None])[:, 0]
    np.testing.assert_allclose(columns["actual_log_prob"], expected.numpy(), atol=3e-6)


def test_a_tiny_tail_is_not_cancelled():
    z = torch.full((1, 1000), -30.0)
    z[0, 0] = 0.0
    kind, columns, _ = capture(z, k=1)
    _, tail = softened(columns["head_logits"], columns["tail_log_partition"], kind.temperatures, 1.0)
    assert tail[0] == pytest.approx(np.log(999) - 30, abs=1e-4)


def test_head_of_the_whole_vocabulary_has_an_empty_tail():
    z = logits(6, 12)
    kind, columns, _ = capture(z, k=12)
    assert np.isneginf(columns["tail_log_partition"]).all()
    head, tail = softened(columns["head_logits"], columns["tail_log_partition"], kind.temperatures, 2.0)
    assert np.isneginf(tail).all()
    np.testing.assert_allclose(np.exp(head).sum(-1), 1.0, atol=1e-6)


def test_padded_rows_of_the_output_matrix_are_excluded():
    z = logits(10, 64)
    z[:, 50:] = 100.0
    _, padded, _ = capture(z, k=8, vocabulary=50)
    _, plain, _ = capture(z[:, :50], k=8)
    for name in plain:
        np.testing.assert_array_equal(padded[name], plain[name])


def test_float16_is_within_its_stated_bound():
    z = logits(50, 300)
    _, exact, _ = capture(z, k=32)
    _, half, _ = capture(z, k=32, dtype="float16")
    difference = np.abs(half["head_logits"].astype(np.float64) - exact["head_logits"])
    assert (difference <= np.abs(exact["head_logits"]) / 2048 + 1e-6).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_unusable(bad):
    z = logits(5, 20)
    z[3, 7] = bad
    _, columns, _ = capture(z, k=4)
    assert TopK.is_usable(columns).tolist() == [True, True, True, False, True]


def test_ruled_out_tokens_are_legal():
    z = logits(4, 20)
    z[:, 2:] = -torch.inf  # fewer than k candidates (FIELD: uninitialised ids with -inf values)
    kind, columns, _ = capture(z, k=6)
    assert TopK.is_usable(columns).all()
    assert (columns["head_ids"] < 20).all()
    head, tail = softened(columns["head_logits"], columns["tail_log_partition"], kind.temperatures, 4.0)
    np.testing.assert_allclose(np.exp(head).sum(-1) + np.exp(tail), 1.0, atol=1e-6)


def test_ids_of_a_large_vocabulary_keep_their_bits():
    kind = TopK(2, (1.0,), "float32", 70_000)
    z = torch.zeros(1, 70_000)
    z[0, 69_999] = 5.0
    assert kind.capture(torch, z, torch.tensor([0]))["head_ids"][0, 0] == 69_999
    assert kind.columns[0].dtype == "<u4"


def test_k_above_the_vocabulary_is_refused():
    with pytest.raises(RecipeError, match="k is 65, but the teacher's tokenizer has 64 tokens"):
        target_kind({"kind": "top-k", "k": 65, "temperatures": [1], "dtype": "float16"}, vocabulary_size=64)


def test_unknown_kind_and_temperature_name_what_there_is():
    with pytest.raises(CacheError, match="it reads: top-k"):
        target_kind({"kind": "holographic"}, vocabulary_size=64)
    with pytest.raises(CacheError, match=r"temperature 3 is not on this cache's grid \(1, 2\)"):
        softened(np.zeros((1, 1)), np.zeros((1, 2)), (1.0, 2.0), 3.0)
