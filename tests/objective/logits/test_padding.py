"""A position with fewer tokens than its batch is filled up with padding, which changes neither the loss nor its gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from teachercache.config import ObjectiveConfig
from teachercache.objective.logits.divergences import divergence_of
from teachercache.objective.logits.fused import distillation_sums
from teachercache.objective.logits.operands import Weights
from teachercache.targets.logits.softened import Softened, UniformTail

N, V, K = 4, 19, 3


def teacher(temperature: float, *, dense: bool) -> Softened:
    z_NV = torch.randn(N, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    log_p_NV = (z_NV / temperature).log_softmax(-1)
    ids_Nk = z_NV.topk(K).indices
    tail_N = log_p_NV.scatter(1, ids_Nk, -math.inf).logsumexp(-1)
    return Softened(ids_Nk, log_p_NV.gather(1, ids_Nk), tail_N, UniformTail(V, log_p_NV) if dense else None)


def padded(exact: Softened) -> Softened:
    ids_Nk = torch.cat([exact.head_ids_Nk, exact.head_ids_Nk[:, :1].expand(N, 2)], dim=1)
    nothing_N2 = torch.full((N, 2), -math.inf, dtype=torch.float64)
    return Softened(ids_Nk, torch.cat([exact.head_log_prob_Nk, nothing_N2], dim=1), exact.tail_log_prob_N, exact.tail)


def loss(distribution: Softened, name: str, temperature: float) -> tuple[Tensor, Tensor]:
    logits = torch.randn(1, N, V, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    total, divergence, _ = distillation_sums(
        logits, positions_N=torch.arange(N), labels_N=torch.arange(N), teacher=distribution, vocabulary_size=V,
        weights=Weights(0.7, temperature), divergence=divergence_of(ObjectiveConfig.model_validate({"divergence": name})),
    )  # fmt: skip
    total.backward()
    assert logits.grad is not None
    return divergence, logits.grad


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("name", ["forward-kl", "reverse-kl", "jensen-shannon", "total-variation"])
def test_padding_changes_nothing(name: str, dense: bool, temperature: float) -> None:
    exact = teacher(temperature, dense=dense)
    for ours, expected in zip(loss(padded(exact), name, temperature), loss(exact, name, temperature), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


def test_padding_leaves_the_dense_distribution_alone() -> None:
    exact = teacher(2.0, dense=True)
    torch.testing.assert_close(padded(exact).dense(), exact.dense())
    again = padded(exact)
    arrays = [array.numpy() for array in (again.head_ids_Nk, again.head_log_prob_Nk, again.tail_log_prob_N)]
    np.testing.assert_allclose(Softened(*arrays, UniformTail(V, arrays[1])).dense(), exact.dense().numpy(), rtol=1e-12)
