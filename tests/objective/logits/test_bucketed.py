"""Forward KL with a bucket for the tail, against dense twins: values, gradients, masks, extremes, and what it allocates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from teachercache.objective.logits.fused import distillation_sums
from teachercache.objective.logits.operands import Weights, no_teacher
from teachercache.targets.logits.softened import Softened

B, S, V = 2, 5, 23
POSITIONS = torch.tensor([0, 1, 2, 5, 7, 8])  # gaps inside rows and between them
N = len(POSITIONS)


def _logits(seed: int, *shape: int, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def _head(teacher_NV: Tensor, k: int, temperature: float) -> Softened:
    log_p_NV = (teacher_NV / temperature).log_softmax(-1)
    ids_Nk = teacher_NV.topk(k).indices
    outside_NV = log_p_NV.scatter(1, ids_Nk, -math.inf)
    return Softened(ids_Nk, log_p_NV.gather(1, ids_Nk), outside_NV.logsumexp(-1))


def _labels(seed: int = 9, count: int = N) -> Tensor:
    return torch.randint(0, V, (count,), generator=torch.Generator().manual_seed(seed))


def _ours(logits_BSL: Tensor, head: Softened, alpha: float, temperature: float, **options: Any) -> tuple[Tensor, ...]:
    arguments: dict[str, Any] = {"positions_N": POSITIONS, "labels_N": _labels(), "vocabulary_size": V} | options
    return distillation_sums(logits_BSL, teacher=head, weights=Weights(alpha, temperature), **arguments)


def _dense(logits_BSL: Tensor, head: Softened, alpha: float, temperature: float) -> tuple[Tensor, ...]:
    """The same loss, written down naively: the twin."""
    z_NV = logits_BSL.reshape(-1, logits_BSL.shape[-1])[POSITIONS][:, :V]
    log_q_NV = (z_NV / temperature).log_softmax(-1)
    log_q_Nk = log_q_NV.gather(1, head.head_ids_Nk)
    p_Nk, tail_N = head.head_log_prob_Nk.exp(), head.tail_log_prob_N.exp()
    kl = torch.where(p_Nk > 0, p_Nk * (head.head_log_prob_Nk - log_q_Nk), 0.0).sum()
    if bool((tail_N > 0).any()):
        log_q_tail_N = log_q_NV.scatter(1, head.head_ids_Nk, -math.inf).logsumexp(-1)
        kl = kl + torch.where(tail_N > 0, tail_N * (head.tail_log_prob_N - log_q_tail_N), 0.0).sum()
    ce = F.cross_entropy(z_NV, _labels(), reduction="sum")
    return alpha * temperature**2 * kl + (1 - alpha) * ce, kl, ce


def _gradient(loss: Any, logits_BSL: Tensor, *arguments: Any, **options: Any) -> tuple[list[Tensor], Tensor]:
    leaf = logits_BSL.clone().requires_grad_()
    values = loss(leaf, *arguments, **options)
    values[0].backward()
    assert leaf.grad is not None
    return [value.detach() for value in values], leaf.grad


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.0, 4.0, 8.0])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("renormalise", [False, True])
def test_values_and_gradient_equal_the_dense_twin(temperature: float, alpha: float, renormalise: bool) -> None:
    student, head = _logits(0, B, S, V), _head(_logits(1, N, V), 4, temperature)
    head = head.renormalised() if renormalise else head
    values, gradient = _gradient(_ours, student, head, alpha, temperature)
    expected, expected_gradient = _gradient(_dense, student, head, alpha, temperature)
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("k", [3, V])
def test_gradient_equals_finite_differences(temperature: float, k: int) -> None:
    """`torch.autograd.gradcheck` runs backward many times on one output, which the single buffer refuses."""
    head, student = _head(_logits(1, N, V), k, temperature), _logits(0, B, S, V)
    _, gradient = _gradient(_ours, student, head, 0.7, temperature)
    step = 1e-6
    for index in range(0, student.numel(), 3):
        nudge = torch.zeros_like(student)
        nudge.view(-1)[index] = step
        above, below = (_ours(student + sign * nudge, head, 0.7, temperature)[0] for sign in (1, -1))
        assert abs(float(above - below) / (2 * step) - float(gradient.view(-1)[index])) < 1e-7


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_head_of_the_whole_vocabulary_is_full_distillation(temperature: float) -> None:
    student, teacher = _logits(0, B, S, V), _logits(1, N, V)

    def full(z_BSV: Tensor) -> tuple[Tensor]:
        log_q_NV = (z_BSV.reshape(-1, V)[POSITIONS] / temperature).log_softmax(-1)
        p_NV = (teacher / temperature).softmax(-1)
        return (temperature**2 * F.kl_div(log_q_NV, p_NV, reduction="sum"),)

    values, gradient = _gradient(_ours, student, _head(teacher, V, temperature), 1.0, temperature)
    expected, expected_gradient = _gradient(full, student)
    torch.testing.assert_close(values[0], expected[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-11)


def test_without_a_teacher_it_is_cross_entropy() -> None:
    student = _logits(0, B, S, V)
    values, gradient = _gradient(_ours, student, no_teacher(_labels(), torch.float64), 0.0, 1.0)
    leaf = student.clone().requires_grad_()
    expected = F.cross_entropy(leaf.reshape(-1, V)[POSITIONS], _labels(), reduction="sum")
    expected.backward()
    torch.testing.assert_close(values, [expected.detach(), torch.zeros_like(expected), expected.detach()])
    torch.testing.assert_close(gradient, leaf.grad)


def test_gradient_is_exactly_zero_without_a_target() -> None:
    student, head = _logits(0, B, S, V).float(), _head(_logits(1, N, V), 4, 2.0)
    _, gradient = _gradient(_ours, student, head, 0.5, 2.0)
    unused = torch.ones(B * S, dtype=torch.bool)
    unused[POSITIONS] = False
    assert gradient.reshape(-1, V)[unused].eq(0).all()
    assert gradient.reshape(-1, V)[POSITIONS].abs().sum(-1).gt(0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_padding_that_a_model_rules_out_itself_takes_no_part(dtype: torch.dtype) -> None:
    """Some models write -inf there, or the least number; their gradient is 0, not nan."""
    student, head = _logits(0, B, S, V).to(dtype), _head(_logits(1, N, V), 4, 2.0)
    values, gradient = _gradient(_ours, student, head, 0.5, 2.0)
    for nothing in (-math.inf, torch.finfo(dtype).min):
        padded = torch.cat([student, torch.full((B, S, 9), nothing, dtype=dtype)], dim=-1)
        padded_values, padded_gradient = _gradient(_ours, padded, head, 0.5, 2.0)
        torch.testing.assert_close(padded_values, values)
        torch.testing.assert_close(padded_gradient[..., :V], gradient)
        assert padded_gradient[..., V:].eq(0).all()


def test_without_a_teacher_padding_is_pushed_down_by_cross_entropy_alone() -> None:
    student = _logits(0, B, S, V + 9)
    values, gradient = _gradient(_ours, student, no_teacher(_labels(), torch.float64), 0.0, 1.0)
    leaf = student.clone().requires_grad_()
    expected = F.cross_entropy(leaf.reshape(-1, V + 9)[POSITIONS], _labels(), reduction="sum")
    expected.backward()
    torch.testing.assert_close(values, [expected.detach(), torch.zeros_like(expected), expected.detach()])
    torch.testing.assert_close(gradient, leaf.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_low_precision_logits_lose_only_their_own_rounding(dtype: torch.dtype, temperature: float) -> None:
    student, head = _logits(0, B, S, V).to(dtype), _head(_logits(1, N, V), 4, temperature)
    values, gradient = _gradient(_ours, student, head, 0.5, temperature)
    expected, expected_gradient = _gradient(_ours, student.double(), head, 0.5, temperature)
    assert gradient.dtype == dtype and values[0].dtype == torch.float32
    torch.testing.assert_close([value.double() for value in values], expected, rtol=1e-5, atol=1e-5)
    bound = torch.finfo(dtype).eps * float(expected_gradient.abs().max()) + 1e-6
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=0, atol=bound)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, V),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 4.0, 5.0]),
    scale=st.sampled_from([0.1, 3.0, 40.0]),
)
def test_divergence_is_never_negative(seed: int, k: int, temperature: float, scale: float) -> None:
    head = _head(_logits(seed, N, V, scale=scale), k, temperature)
    _, kl, _ = _ours(_logits(seed + 1, B, S, V, scale=scale).float(), head, 1.0, temperature)
    assert kl >= -1e-6


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, V), temperature=st.sampled_from([1.0, 2.0, 4.0]))
def test_student_equal_to_the_teacher_has_nothing_to_learn(seed: int, k: int, temperature: float) -> None:
    student = _logits(seed, B, S, V)
    head = _head(student.reshape(-1, V)[POSITIONS], k, temperature)
    values, gradient = _gradient(_ours, student, head, 1.0, temperature)
    assert abs(float(values[1])) < 1e-9
    assert gradient.abs().max() < 1e-9


def test_tokens_that_the_teacher_rules_out_count_zero() -> None:
    teacher = _logits(1, N, V)
    teacher[:, 3:] = -math.inf  # three candidates for a head of six, and an empty tail
    student = _logits(0, B, S, V)
    student[..., 10] = -math.inf  # the student may rule it out too
    head = _head(teacher, 6, 1.0)
    for renormalise in (False, True):
        values, gradient = _gradient(_ours, student, head.renormalised() if renormalise else head, 1.0, 1.0)
        assert values[1].isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_tail_far_below_the_head_stays_exact(temperature: float) -> None:
    """In float32 exp(-200) is 0; the student's tail is 200 nats down, and the loss is still right."""
    teacher, student = _logits(1, N, V), _logits(0, B, S, V)
    teacher[:, :4] += 10
    student[..., :4] += 200 * temperature
    head = _head(teacher, 4, temperature)
    values, gradient = _gradient(_ours, student.float(), head, 1.0, temperature)
    expected, expected_gradient = _gradient(_dense, student, head, 1.0, temperature)
    torch.testing.assert_close(values[1].double(), expected[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_the_block_size_does_not_matter(dtype: torch.dtype, temperature: float) -> None:
    student, head = _logits(0, B, S, V).to(dtype), _head(_logits(1, N, V), 4, temperature)
    results = [
        _gradient(_ours, student, head, 0.5, temperature, block_bytes=positions * V * 4) for positions in (1, 2, 4, 99)
    ]
    for values, gradient in results[1:]:
        assert values == results[0][0] and torch.equal(gradient, results[0][1])


def test_the_order_of_positions_does_not_matter() -> None:
    """Swapping the rows of a batch swaps the rows of the gradient."""
    student, teacher = _logits(0, B, S, V), _logits(1, 2 * 3, V)
    swapped = torch.tensor([3, 4, 5, 0, 1, 2])
    here = {"positions_N": torch.tensor([0, 1, 2, 5, 6, 7])}
    values, gradient = _gradient(_ours, student, _head(teacher, 4, 2.0), 0.5, 2.0, **here)
    values_swapped, gradient_swapped = _gradient(
        _ours, student.flip(0), _head(teacher[swapped], 4, 2.0), 0.5, 2.0, labels_N=_labels()[swapped], **here
    )
    torch.testing.assert_close(values, values_swapped)
    torch.testing.assert_close(gradient, gradient_swapped.flip(0), rtol=0, atol=0)


def test_the_gradient_scales_with_what_flows_back() -> None:
    student, head = _logits(0, B, S, V), _head(_logits(1, N, V), 4, 2.0)
    _, gradient = _gradient(_ours, student, head, 0.5, 2.0)
    _, scaled = _gradient(lambda z: (_ours(z, head, 0.5, 2.0)[0] / 7,), student)
    torch.testing.assert_close(scaled, gradient / 7)


def test_a_second_backward_is_refused() -> None:
    student = _logits(0, B, S, V).requires_grad_()
    total, kl, ce = _ours(student, _head(_logits(1, N, V), 4, 1.0), 0.5, 1.0)
    assert not kl.requires_grad and not ce.requires_grad
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once per forward"):
        total.backward()


class _LargeTensors(TorchDispatchMode):
    """Counts distinct allocations of at least `numel` elements."""

    def __init__(self, numel: int, known: Tensor) -> None:
        super().__init__()
        self.numel, self.known, self.made = numel, known.untyped_storage().data_ptr(), set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.numel() >= self.numel:
                self.made.add(tensor.untyped_storage().data_ptr())
        self.made.discard(self.known)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("with_gradient", "allowed"), [(True, 1), (False, 0)])
def test_the_gradient_is_the_only_large_allocation(dtype: torch.dtype, with_gradient: bool, allowed: int) -> None:
    student = _logits(0, B, S, V).to(dtype).requires_grad_()
    head = _head(_logits(1, N, V), 4, 2.0)
    with _LargeTensors(N * V, student) as counted, torch.set_grad_enabled(with_gradient):
        total = _ours(student, head, 0.5, 2.0, block_bytes=2 * V * 4)[0]
        if with_gradient:
            total.backward()
    assert len(counted.made) == allowed
