"""The loss with the output projection inside it: against whole logits, and what it allocates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from objective.seeded import D, L, Largest, N, V, leaves, random, teacher
from teachercache.objective.logits.divergences import Divergence, JensenShannon, forward_kl, reverse_kl
from teachercache.objective.logits.fused import distillation_sums
from teachercache.objective.logits.operands import Weights, no_teacher
from teachercache.objective.logits.projected import projected_sums
from teachercache.targets.logits.softened import SketchTail, Softened


def whole(hidden_ND: Tensor, weight_LD: Tensor, bias_L: Tensor | None, softcap: float | None, **options: Any) -> Any:
    """The twin: all logits at once."""
    logits_NL = torch.nn.functional.linear(hidden_ND, weight_LD, bias_L)
    if softcap is not None:
        logits_NL = torch.tanh(logits_NL / softcap) * softcap
    return distillation_sums(logits_NL, positions_N=torch.arange(len(hidden_ND)), **options)


@pytest.mark.parametrize("tail", ["ghost", "uniform", "sketch"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, JensenShannon(0.3)])
def test_values_and_all_gradients_equal_those_of_whole_logits(
    tail: str, temperature: float, softcap: float | None, divergence: Divergence
) -> None:
    options: dict[str, Any] = {
        "labels_N": torch.arange(N) % V, "teacher": teacher(tail), "weights": Weights(0.7, temperature),
        "vocabulary_size": V, "divergence": divergence, "position_weight_N": random(8, N).abs(),
    }  # fmt: skip
    ours, expected = leaves(), leaves()
    values = projected_sums(*ours, softcap=softcap, chunk_bytes=4 * L * 6, **options)  # chunks of 6, the last of 5
    twin = whole(*expected, softcap, **options)
    torch.testing.assert_close(values, twin, rtol=1e-10, atol=1e-10)
    (values[0] * 0.25).backward()
    (twin[0] * 0.25).backward()
    for mine, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("wanted", ["hidden", "weight", "nothing"])
def test_only_what_is_trained_gets_a_gradient(wanted: str) -> None:
    hidden, weight, _ = leaves(bias=False)
    hidden.requires_grad_(wanted == "hidden")
    weight.requires_grad_(wanted == "weight")
    options: dict[str, Any] = {"teacher": teacher("ghost"), "weights": Weights(0.5, 1.0), "vocabulary_size": V}
    total, _, _ = projected_sums(hidden, weight, None, labels_N=torch.arange(N), **options)
    assert total.requires_grad == (wanted != "nothing")
    if wanted != "nothing":
        total.backward()
    assert (hidden.grad is not None, weight.grad is not None) == (wanted == "hidden", wanted == "weight")


def test_no_positions_give_zeros_that_reach_the_weights() -> None:
    weight = random(1, L, D).requires_grad_()
    nothing = no_teacher(torch.zeros(0, dtype=torch.int64), torch.float64)
    options: dict[str, Any] = {"teacher": nothing, "weights": Weights(0.0, 1.0), "vocabulary_size": V}
    total, _, _ = projected_sums(random(0, 0, D), weight, None, labels_N=torch.zeros(0, dtype=torch.int64), **options)
    total.backward()
    assert float(total.detach()) == 0
    assert not weight.grad.any()


def test_half_precision_gradients_add_up_in_float32() -> None:
    hidden, weight, _ = leaves(torch.bfloat16, bias=False)
    exact_hidden, exact_weight = (values.detach().double().requires_grad_() for values in (hidden, weight))
    common: dict[str, Any] = {"labels_N": torch.arange(N), "weights": Weights(0.5, 2.0), "vocabulary_size": V}
    total, _, _ = projected_sums(
        hidden, weight, None, teacher=teacher("sketch", torch.float32), chunk_bytes=4 * L, **common
    )
    twin, _, _ = whole(exact_hidden, exact_weight, None, None, teacher=teacher("sketch"), **common)
    total.backward()
    twin.backward()
    assert total.dtype == torch.float32 and weight.grad.dtype == torch.bfloat16
    for mine, other in ((hidden, exact_hidden), (weight, exact_weight)):
        error = (mine.grad.double() - other.grad).norm() / other.grad.norm()
        assert error < 0.01  # a few roundings to 8 bits, not N of them


def test_autocast_decides_the_type_of_the_matmuls_and_gradients_come_back_in_the_weights_own() -> None:
    hidden, weight, _ = leaves(torch.float32, bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _, _ = projected_sums(
            hidden, weight, None, labels_N=torch.arange(N), teacher=teacher("ghost", torch.float32),
            weights=Weights(0.5, 1.0), vocabulary_size=V,
        )  # fmt: skip
    total.backward()
    assert weight.grad.dtype == torch.float32
    assert (weight.grad == weight.grad.bfloat16().float()).all()


@pytest.mark.parametrize("tail", ["ghost", "sketch"])
def test_nothing_as_large_as_the_logits_is_ever_made(tail: str) -> None:
    positions, vocabulary, width, chunk = 600, 5000, 4, 50
    log_p = torch.randn(positions, 3).log_softmax(-1)
    softened = Softened(torch.randint(0, 50, (positions, 1)), log_p[:, :1], log_p[:, 1:].logsumexp(-1))
    if tail == "sketch":
        softened = softened.with_tail(
            SketchTail(torch.randn(positions, 2), torch.randn(vocabulary, 2), torch.randn(vocabulary))
        )
    hidden, weight = torch.randn(positions, width).requires_grad_(), torch.randn(vocabulary, width).requires_grad_()
    labels = torch.randint(0, vocabulary, (positions,))
    with Largest() as largest:
        total, _, _ = projected_sums(
            hidden, weight, None, labels_N=labels, teacher=softened, weights=Weights(0.5, 2.0),
            vocabulary_size=vocabulary, chunk_bytes=4 * vocabulary * chunk,
        )  # fmt: skip
        total.backward()
    assert largest.elements <= 128 * vocabulary  # a chunk of a sketch's tail is at most 128 positions
    assert largest.elements < positions * vocabulary / 4
