"""Every divergence under every tail policy against one naive dense twin: values, gradients, weights, extremes, memory."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from teachercache.objective.logits.divergences import (
    LEAST_LOG_PROB,
    JensenShannon,
    forward_kl,
    reverse_kl,
    total_variation,
)
from teachercache.objective.logits.fused import distillation_sums
from teachercache.objective.logits.operands import Weights
from teachercache.targets.logits.softened import SketchTail, Softened, UniformTail

B, S, V, K, RANK = 2, 9, 31, 5, 6
POSITIONS = torch.tensor([0, 1, 2, 3, 5, 9, 10, 11, 12, 13, 16])  # gaps inside rows and between them
N = len(POSITIONS)
DIVERGENCES = {
    "forward-kl": forward_kl,
    "reverse-kl": reverse_kl,
    "jensen-shannon": JensenShannon(0.5),
    "lopsided": JensenShannon(0.1),
    "total-variation": total_variation,
}
POLICIES = ("ghost", "uniform", "renormalise", "sketch", "capped")


def _random(seed: int, *shape: int, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


LABELS = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(9))


def _teacher(policy: str, temperature: float, *, seed: int = 1, k: int = K, positions: int = N) -> Softened:
    logits_NV = _random(seed, positions, V)
    log_p_NV = (logits_NV / temperature).log_softmax(-1)
    ids_Nk = logits_NV.topk(k).indices
    outside_NV = log_p_NV.scatter(1, ids_Nk, -math.inf)
    ghost = Softened(ids_Nk, log_p_NV.gather(1, ids_Nk), outside_NV.logsumexp(-1))
    sketch = SketchTail(_random(2, positions, RANK) / temperature, _random(3, V, RANK), _random(4, V))
    capped = SketchTail(
        _random(2, positions, RANK), _random(3, V, RANK), _random(4, V), 5.0, temperature, _random(5, V)
    )
    tails = {"uniform": UniformTail(V, like=ghost.head_log_prob_Nk), "sketch": sketch, "capped": capped}
    return ghost.renormalised() if policy == "renormalise" else ghost.with_tail(tails.get(policy))


def _ours(
    logits_BSL: Tensor, teacher: Softened, name: str, alpha: float, temperature: float, **options: Any
) -> tuple[Tensor, ...]:
    arguments: dict[str, Any] = {"positions_N": POSITIONS, "labels_N": LABELS, "vocabulary_size": V} | options
    weights = Weights(alpha, temperature)
    return distillation_sums(logits_BSL, teacher=teacher, weights=weights, divergence=DIVERGENCES[name], **arguments)


def _outcomes(teacher: Softened, z_NL: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log p and log q over the outcomes that the policy tells apart: all tokens, or the head and a bucket; and padding, each
    column of which is one that the teacher rules out."""
    log_q_NL = (z_NL / temperature).log_softmax(-1)
    log_q_NV, log_q_NP = log_q_NL[:, :V], log_q_NL[:, V:]
    ruled_out_NP = torch.full_like(log_q_NP, -math.inf)
    if teacher.head_ids_Nk.shape[1] == V:
        log_p_NA, log_q_NA = teacher.head_log_prob_Nk, log_q_NV.gather(1, teacher.head_ids_Nk)
    elif teacher.tail is not None:
        log_p_NA, log_q_NA = teacher.dense(), log_q_NV
    else:
        log_bucket_N1 = log_q_NV.scatter(1, teacher.head_ids_Nk, -math.inf).logsumexp(-1, keepdim=True)
        log_q_NA = torch.cat([log_q_NV.gather(1, teacher.head_ids_Nk), log_bucket_N1], dim=-1)
        log_p_NA = torch.cat([teacher.head_log_prob_Nk, teacher.tail_log_prob_N[:, None]], dim=-1)
    return torch.cat([log_p_NA, ruled_out_NP], dim=-1), torch.cat([log_q_NA, log_q_NP], dim=-1)


def _textbook(name: str, log_p_NA: Tensor, log_q_NA: Tensor) -> Tensor:
    """The divergence as books write it, [N]."""
    p_NA, q_NA = log_p_NA.exp(), log_q_NA.exp()
    if name == "forward-kl":
        return F.kl_div(log_q_NA, p_NA, reduction="none").sum(-1)
    if name == "reverse-kl":
        return F.kl_div(log_p_NA.clamp_min(LEAST_LOG_PROB), q_NA, reduction="none").sum(-1)
    if name == "total-variation":
        return (p_NA - q_NA).abs().sum(-1) / 2
    mixing = DIVERGENCES[name].mixing  # type: ignore[attr-defined]
    log_m_NA = (mixing * p_NA + (1 - mixing) * q_NA).log()
    to_p, to_q = (F.kl_div(log_m_NA, side_NA, reduction="none").sum(-1) for side_NA in (p_NA, q_NA))
    return mixing * to_p + (1 - mixing) * to_q


def _twin(
    logits_BSL: Tensor,
    teacher: Softened,
    name: str,
    alpha: float,
    temperature: float,
    position_weight_N: Tensor | float = 1.0,
) -> tuple[Tensor, ...]:
    z_NL = logits_BSL.reshape(-1, logits_BSL.shape[-1])[POSITIONS]
    divergence_N = _textbook(name, *_outcomes(teacher, z_NL, temperature))
    divergence = (divergence_N * position_weight_N).sum()
    ce = (F.cross_entropy(z_NL, LABELS, reduction="none") * position_weight_N).sum()
    return alpha * temperature**2 * divergence + (1 - alpha) * ce, divergence, ce


def _gradient(loss: Any, logits_BSL: Tensor, *arguments: Any, **options: Any) -> tuple[list[Tensor], Tensor]:
    leaf = logits_BSL.clone().requires_grad_()
    values = loss(leaf, *arguments, **options)
    values[0].backward()
    assert leaf.grad is not None
    return [value.detach() for value in values], leaf.grad


@pytest.mark.parametrize("temperature", [1.0, 2.5, 4.0])
@pytest.mark.parametrize("padding", ["none", "like tokens", "certain"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_values_and_gradient_equal_the_twin(name: str, policy: str, padding: str, temperature: float) -> None:
    """With and without CE, and with columns beyond the vocabulary, to which the teacher gives nothing."""
    student = _random(0, B, S, V + (0 if padding == "none" else 7))
    if padding == "certain":
        student[..., V:] += 30
    teacher = _teacher(policy, temperature)
    for alpha, block_positions in itertools.product((1.0, 0.7), (3, 99)):
        case = student, teacher, name, alpha, temperature
        values, gradient = _gradient(_ours, *case, block_bytes=block_positions * V * 8)
        expected, expected_gradient = _gradient(_twin, *case)
        torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-11)
        if name == "forward-kl" and padding != "none":  # always away from padding
            assert gradient.reshape(-1, V + 7)[POSITIONS, V:].gt(0).all()


@pytest.mark.parametrize("policy", ["ghost", "sketch"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_positions_can_weigh_differently(name: str, policy: str) -> None:
    student, teacher = _random(0, B, S, V), _teacher(policy, 2.0)
    weight_N = torch.linspace(0, 3, N, dtype=torch.float64)
    case = student, teacher, name, 0.7, 2.0
    values, gradient = _gradient(_ours, *case, position_weight_N=weight_N)
    expected, expected_gradient = _gradient(_twin, *case, position_weight_N=weight_N)
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-11)
    assert gradient.reshape(-1, V)[POSITIONS[0]].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_low_precision_logits_lose_only_their_own_rounding(name: str, policy: str, dtype: torch.dtype) -> None:
    student = _random(0, B, S, V).to(dtype)
    for temperature in (1.0, 2.0, 2.5):
        case = _teacher(policy, temperature), name, 0.7, temperature
        values, gradient = _gradient(_ours, student, *case)
        expected, expected_gradient = _gradient(_twin, student.double(), *case)
        assert gradient.dtype == dtype and values[0].dtype == torch.float32
        torch.testing.assert_close([value.double() for value in values], expected, rtol=1e-5, atol=1e-5)
        bound = (torch.finfo(dtype).eps + 1e-5) * float(expected_gradient.abs().max()) + 1e-6
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=0, atol=bound)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_no_positions_give_zero_and_reach_the_logits(name: str, policy: str) -> None:
    teacher = _teacher(policy, 2.0, positions=0)
    none = torch.empty(0, dtype=torch.int64)
    values, gradient = _gradient(
        _ours, _random(0, B, S, V), teacher, name, 0.7, 2.0, positions_N=none, labels_N=none
    )  # fmt: skip
    assert all(value == 0 for value in values) and gradient.eq(0).all()


@pytest.mark.parametrize("policy", ["ghost", "uniform", "sketch"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_head_of_the_whole_vocabulary_makes_all_policies_one(name: str, policy: str) -> None:
    case = _random(0, B, S, V), _teacher(policy, 2.0, k=V), name, 0.7, 2.0
    values, gradient = _gradient(_ours, *case)
    expected, expected_gradient = _gradient(_twin, *case)
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 8.0])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_extremes_give_no_nan(name: str, policy: str, temperature: float) -> None:
    """Students and teachers that rule tokens out, in float32 where exp(-200) is 0."""
    student = _random(0, B, S, V).float()
    student[..., :4] += 200
    teacher = _teacher(policy, temperature)
    nothing_N = torch.full_like(teacher.tail_log_prob_N, -math.inf)
    head_Nk = teacher.head_log_prob_Nk.clone()
    head_Nk[:, -1] = -math.inf
    empty = Softened(teacher.head_ids_Nk, head_Nk.log_softmax(-1), nothing_N, teacher.tail)
    for one in (teacher, empty):
        values, gradient = _gradient(_ours, student, one, name, 0.7, temperature)
        assert all(value.isfinite() for value in values) and gradient.isfinite().all()
    student[..., 11] = -math.inf
    values, gradient = _gradient(_ours, student, teacher, name, 1.0, temperature)
    assert not values[1].isnan() and gradient.isfinite().all()
    assert values[1].isfinite() or name == "forward-kl"


def test_reverse_kl_counts_a_floor_where_the_teacher_has_nothing() -> None:
    student, teacher = _random(0, B, S, V), _teacher("renormalise", 1.0)
    values, gradient = _gradient(_ours, student, teacher, "reverse-kl", 1.0, 1.0)
    q_NV = student.reshape(-1, V)[POSITIONS].softmax(-1)
    outside = float(1 - q_NV.gather(1, teacher.head_ids_Nk).sum()) + N - 1
    assert values[1] > outside * -LEAST_LOG_PROB / 2
    assert gradient.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, V),
    name=st.sampled_from(list(DIVERGENCES)),
    policy=st.sampled_from(POLICIES),
    temperature=st.sampled_from([1.0, 2.0, 5.0]),
    scale=st.sampled_from([0.1, 3.0, 40.0]),
)
def test_divergences_are_never_negative_and_the_bounded_ones_bounded(
    seed: int, k: int, name: str, policy: str, temperature: float, scale: float
) -> None:
    teacher = _teacher(policy, temperature, seed=seed, k=k)
    _, divergence, _ = _ours(_random(seed + 1, B, S, V, scale=scale).float(), teacher, name, 1.0, temperature)
    assert divergence >= -1e-4
    if name in ("jensen-shannon", "total-variation"):
        assert divergence <= N * (1 + 1e-5)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6), name=st.sampled_from(list(DIVERGENCES)), policy=st.sampled_from(["uniform", "sketch"])
)
def test_student_equal_to_the_teacher_has_nothing_to_learn(seed: int, name: str, policy: str) -> None:
    teacher = _teacher(policy, 2.0, seed=seed)
    student = _random(0, B * S, V)
    student[POSITIONS] = teacher.dense() * 2
    values, gradient = _gradient(_ours, student.view(B, S, V), teacher, name, 1.0, 2.0)
    assert abs(float(values[1])) < 1e-9
    assert name == "total-variation" or gradient.abs().max() < 1e-9


class _LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that is made, the gradient's buffer apart."""

    def __init__(self, known_numel: int) -> None:
        super().__init__()
        self.known_numel, self.numel = known_numel, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() != self.known_numel * 4:
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_nothing_but_the_gradient_grows_with_positions_times_vocabulary(
    name: str, policy: str, temperature: float
) -> None:
    largest = []
    for positions in (512, 1024):
        teacher = _teacher(policy, temperature, positions=positions)
        student = _random(0, 1, positions, V).float().requires_grad_()
        everywhere = torch.arange(positions)
        with _LargestTensor(student.numel()) as counted:
            options = {"positions_N": everywhere, "labels_N": everywhere % V, "block_bytes": 16 * V * 4}
            _ours(student, teacher, name, 0.7, temperature, **options)[0].backward()
        largest.append(counted.numel - positions * (2 * RANK))  # what is small: [N, k] and the like
    assert max(largest) <= 128 * V * 2
