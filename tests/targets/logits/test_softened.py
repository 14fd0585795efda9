"""`Softened`: one distribution, whatever the tail policy, in numpy and torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from teachercache.errors import CacheError
from teachercache.targets import TopK
from teachercache.targets.logits.softened import SketchTail, Softened
from teachercache.targets.logits.tail import NODES, decode_nodes, fit_node_weights, node_sums, quantise_nodes, tail_at

V, K = 500, 7


def capture(seed: int = 0, positions: int = 40) -> tuple[TopK, torch.Tensor, dict[str, np.ndarray]]:
    z = torch.randn(positions, V, generator=torch.Generator().manual_seed(seed)) * 3
    kind = TopK(K, (1.0, 2.0), "float32", V)
    return kind, z, kind.decoded(kind.finish(kind.capture(torch, z.clone(), torch.zeros(positions, dtype=torch.int64))))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_uniform_tail_is_dense_and_sums_to_one(temperature: float) -> None:
    kind, z, arrays = capture()
    dense = kind.softened(arrays, temperature, tail="uniform").dense()
    exact = torch.log_softmax(z.double() / temperature, -1).numpy()
    ids = arrays["head_ids"].astype(np.int64)
    np.testing.assert_allclose(np.exp(dense).sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(dense, ids, 1), np.take_along_axis(exact, ids, 1), atol=1e-5)
    outside = np.sort(dense, axis=1)[:, :-K]
    np.testing.assert_allclose(outside.max(1), outside.min(1), atol=1e-6)


def test_numpy_and_torch_agree() -> None:
    kind, _, arrays = capture()
    tensors = {name: torch.from_numpy(values) for name, values in arrays.items()}
    tensors["head_ids"] = tensors["head_ids"].long()
    ours = kind.softened(arrays, 2.0, tail="uniform")
    theirs = kind.softened(tensors, 2.0, tail="uniform", xp=torch)
    np.testing.assert_allclose(ours.dense(slice(3, 9)), theirs.dense(slice(3, 9)).numpy(), atol=1e-5)
    for mine, other in zip(ours.topk(3), theirs.topk(3), strict=True):
        np.testing.assert_allclose(mine, other.numpy(), atol=1e-6)


def test_topk_are_the_softened_probabilities_themselves() -> None:
    kind, z, arrays = capture()
    ids, probabilities = kind.softened(arrays, 2.0).topk(3)
    expected = torch.softmax(z.double() / 2, -1).topk(3)
    np.testing.assert_array_equal(ids, expected.indices.numpy())
    np.testing.assert_allclose(probabilities, expected.values.numpy(), atol=1e-6)
    with pytest.raises(ValueError, match="the head holds 7 tokens, 8 were asked for"):
        kind.softened(arrays, 2.0).topk(8)


def test_renormalised_head_has_mass_one_and_no_tail() -> None:
    kind, _, arrays = capture()
    softened = kind.softened(arrays, 1.0, tail="renormalise")
    np.testing.assert_allclose(np.exp(softened.head_log_prob_Nk).sum(-1), 1, atol=1e-6)
    assert np.isneginf(softened.tail_log_prob_N).all()


def test_a_bucket_has_no_shape_to_expand() -> None:
    kind, _, arrays = capture()
    with pytest.raises(ValueError, match="choose the tail policy uniform or sketch"):
        kind.softened(arrays, 1.0, tail="ghost").dense()
    with pytest.raises(CacheError, match="precompute with targets.logits.kind: head\\+sketch"):
        kind.softened(arrays, 1.0, tail="sketch")


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_full_rank_sketch_tail_is_the_teacher(temperature: float, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(1)
    h, weight = torch.randn(9, 16, generator=generator), torch.randn(V, 16, generator=generator)
    z = h @ weight.T
    z = softcap * torch.tanh(z / softcap) if softcap else z
    exact = torch.log_softmax(z / temperature, -1)
    ids = exact.topk(K).indices
    tail_N = torch.log1p(-exact.gather(1, ids).exp().sum(-1))
    nothing = torch.zeros(V)
    tail = SketchTail(h / temperature, weight, nothing)
    if softcap:
        tail = SketchTail(h, weight, nothing, softcap, temperature, nothing)
    dense = Softened(ids, exact.gather(1, ids), tail_N, tail).dense()
    torch.testing.assert_close(dense, exact, atol=2e-4, rtol=1e-4)


def nodes_of(z: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    head, ids = z.topk(k)
    relative = z - head[:, :1]
    nodes = node_sums(torch, relative.clone(), ids).numpy()
    return nodes, (head - head[:, :1]).numpy(), relative.scatter(1, ids, -math.inf)


def test_nodes_are_log_sums_outside_the_head() -> None:
    z = torch.randn(30, V, generator=torch.Generator().manual_seed(2)) * 3
    nodes, _, outside = nodes_of(z, K)
    for index, temperature in enumerate(NODES):
        expected = (outside.double() / temperature).logsumexp(-1)
        np.testing.assert_allclose(nodes[:, index], expected.numpy(), atol=2e-5)


@pytest.mark.parametrize("temperature", [1, 1.05, 1.1, 1.25, 1.7, 2, 3, 5, 8, 20])
def test_log_z_at_any_temperature_from_coded_nodes(temperature: float) -> None:
    z = torch.randn(300, V, generator=torch.Generator().manual_seed(3)) * 3
    nodes, head, outside = nodes_of(z, K)
    weights = fit_node_weights(nodes[150:], head[150:])
    codes = quantise_nodes(nodes, head, weights)
    decoded = decode_nodes(codes, head, weights)
    assert np.abs(decoded - nodes).max() <= 0.003 + 1e-4
    exact = (outside.double() / temperature).logsumexp(-1).numpy()
    assert np.abs(tail_at(decoded, temperature, tail_tokens=V - K) - exact).max() < 0.02


def test_temperatures_below_one_are_refused_with_the_remedy() -> None:
    with pytest.raises(CacheError, match="temperature 0.5 is below 1: .* use T >= 1"):
        tail_at(np.zeros((1, len(NODES))), 0.5, tail_tokens=9)
