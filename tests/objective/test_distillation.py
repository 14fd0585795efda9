"""The objective of a recipe: from a batch and a cache's columns to loss sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from teachercache.config import ObjectiveConfig, parse_recipe
from teachercache.errors import CacheError, ModelError, RecipeError
from teachercache.objective import DistillationObjective
from teachercache.objective.logits.student_output import StudentOutput
from teachercache.targets import TopK

B, S, V = 2, 6, 40
N = 6
GRID = (1.0, 2.0, 4.0)
LABELS = torch.tensor([[3, 4, -100, 5, 6, -100], [7, -100, -100, -100, 8, -100]])


def _logits(seed: int, count: int = B * S) -> Tensor:
    return torch.randn(count, V, generator=torch.Generator().manual_seed(seed)) * 3


def _columns(teacher_NV: Tensor, k: int, dtype: str = "float32", labels: Tensor = LABELS) -> dict[str, Tensor]:
    """Columns as the cache stores them, which is how a batch brings them."""
    stored = TopK(k, GRID, dtype, V).capture(torch, teacher_NV.clone(), labels[labels != -100])
    return {name: torch.from_numpy(values.copy()) for name, values in stored.items()}


def _objective(k: int, **config: object) -> DistillationObjective:
    return DistillationObjective(ObjectiveConfig(**config), kind=TopK(k, GRID, "float32", V))  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", GRID)
def test_a_full_head_is_hinton_distillation(temperature: float) -> None:
    teacher_NV, student = _logits(0, N), _logits(1).view(B, S, V).requires_grad_()
    terms = _objective(V, alpha=0.9, temperature=temperature)(
        StudentOutput.of_logits(student), LABELS, _columns(teacher_NV, V)
    )
    (gradient,) = torch.autograd.grad(terms.total, student)
    z_NV = student[LABELS != -100]
    kl = F.kl_div((z_NV / temperature).log_softmax(-1), (teacher_NV / temperature).softmax(-1), reduction="sum")
    ce = F.cross_entropy(student.view(-1, V), LABELS.view(-1), reduction="sum")
    total = 0.9 * temperature**2 * kl + 0.1 * ce
    torch.testing.assert_close([terms.total, terms.divergence, terms.ce], [total, kl, ce], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, torch.autograd.grad(total, student)[0], rtol=1e-4, atol=1e-4)
    assert terms.positions == N


@pytest.mark.parametrize("temperature", GRID)
def test_ghost_and_renormalised_tails(temperature: float) -> None:
    """The bucket holds the teacher's exact mass outside the head; renormalised, the head alone is the teacher."""
    teacher_NV, student = _logits(0, N), _logits(1).view(B, S, V)
    p_NV, q_NV = (teacher_NV / temperature).softmax(-1), (student[LABELS != -100] / temperature).softmax(-1)
    ids = teacher_NV.topk(4).indices
    p_Nk, q_Nk = p_NV.gather(1, ids), q_NV.gather(1, ids)
    p_tail, q_tail = 1 - p_Nk.sum(-1), 1 - q_Nk.sum(-1)
    ghost = (p_Nk * (p_Nk / q_Nk).log()).sum() + (p_tail * (p_tail / q_tail).log()).sum()
    head_Nk = p_Nk / p_Nk.sum(-1, keepdim=True)
    renormalised = (head_Nk * (head_Nk / q_Nk).log()).sum()
    for tail, expected in (("ghost", ghost), ("renormalise", renormalised)):
        terms = _objective(4, alpha=1.0, temperature=temperature, tail=tail)(
            StudentOutput.of_logits(student), LABELS, _columns(teacher_NV, 4)
        )
        torch.testing.assert_close(terms.divergence, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("divergence", ["forward-kl", "reverse-kl", "jensen-shannon", "total-variation"])
def test_a_uniform_tail_is_a_dense_teacher(divergence: str) -> None:
    """Every divergence of the recipe against the teacher that the tail policy describes."""
    teacher_NV, student = _logits(0, N), _logits(1).view(B, S, V).requires_grad_()
    objective = _objective(4, alpha=1.0, temperature=2.0, tail="uniform", divergence=divergence, mixing=0.3)
    terms = objective(StudentOutput.of_logits(student), LABELS, _columns(teacher_NV, 4))
    ids = teacher_NV.topk(4).indices
    p_NV = (teacher_NV / 2).softmax(-1)
    share_N1 = (1 - p_NV.gather(1, ids).sum(-1, keepdim=True)) / (V - 4)
    p_NV = share_N1.expand(N, V).scatter(1, ids, p_NV.gather(1, ids))
    q_NV = (student[LABELS != -100] / 2).softmax(-1)
    m_NV = 0.3 * p_NV + 0.7 * q_NV
    expected = {
        "forward-kl": (p_NV * (p_NV / q_NV).log()).sum(),
        "reverse-kl": (q_NV * (q_NV / p_NV).log()).sum(),
        "jensen-shannon": (0.3 * p_NV * (p_NV / m_NV).log() + 0.7 * q_NV * (q_NV / m_NV).log()).sum(),
        "total-variation": (p_NV - q_NV).abs().sum() / 2,
    }[divergence]
    torch.testing.assert_close(terms.divergence, expected.detach(), rtol=1e-3, atol=1e-4)
    gradients = (torch.autograd.grad(loss, student)[0] for loss in (terms.total, 4 * expected))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_a_position_of_weight_two_counts_twice() -> None:
    student, columns = _logits(1).view(B, S, V), _columns(_logits(0, N), 4)
    objective, weight_N = _objective(4, alpha=0.5, temperature=2.0), torch.zeros(N)
    weight_N[3] = 2
    alone_BS = torch.full_like(LABELS, -100)
    alone_BS[0, 4] = LABELS[0, 4]
    weighted = objective(StudentOutput.of_logits(student), LABELS, columns, position_weight_N=weight_N)
    alone = objective(
        StudentOutput.of_logits(student), alone_BS, {name: values[3:4] for name, values in columns.items()}
    )
    torch.testing.assert_close(weighted.total, 2 * alone.total)
    torch.testing.assert_close([weighted.divergence, weighted.ce], [2 * alone.divergence, 2 * alone.ce])


def test_labels_are_aligned_with_the_logits_that_predict_them() -> None:
    """Mistake 1 of the field, off by one: the gradient is zero exactly where shift_labels is -100."""
    student = _logits(1).view(B, S, V).requires_grad_()
    terms = _objective(4, alpha=0.5, temperature=2.0)(
        StudentOutput.of_logits(student), LABELS, _columns(_logits(0, N), 4)
    )
    (gradient,) = torch.autograd.grad(terms.total, student)
    assert torch.equal(gradient.abs().sum(-1) > 0, LABELS != -100)


def test_without_a_teacher_no_columns_are_needed() -> None:
    config = ObjectiveConfig(alpha=0.0, temperature=2.5)
    objective = DistillationObjective(config, kind=TopK(4, (1.0,), "float32", V))
    assert objective.columns == ()
    student = _logits(1).view(B, S, V)
    terms = objective(StudentOutput.of_logits(student), LABELS)
    expected = F.cross_entropy(student.view(-1, V), LABELS.view(-1), reduction="sum")
    torch.testing.assert_close(terms.total, expected)
    assert terms.divergence == 0


def test_required_columns_are_columns_of_the_cache() -> None:
    stored = {column.name for column in TopK(4, GRID, "float16", V).columns}
    assert set(_objective(4).columns) <= stored


def test_stored_types_are_taken_as_they_come() -> None:
    """uint16 ids and float16 values give what float32 gives, up to the rounding of the stored values."""
    student, teacher_NV = _logits(1).view(B, S, V), _logits(0, N)
    objective = _objective(4, alpha=0.9, temperature=2.0)
    coarse, exact = (
        objective(StudentOutput.of_logits(student), LABELS, _columns(teacher_NV, 4, dtype))
        for dtype in ("float16", "float32")
    )
    assert _columns(teacher_NV, 4, "float16")["head_ids"].numpy().dtype == np.uint16
    torch.testing.assert_close(coarse.total, exact.total, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("alpha", [0.0, 0.9])
def test_a_batch_without_positions_gives_zero_and_reaches_the_logits(alpha: float) -> None:
    nothing = torch.full((B, S), -100)
    student = _logits(1).view(B, S, V).requires_grad_()
    empty = {name: values[:0] for name, values in _columns(_logits(0, N), 4).items()}
    terms = _objective(4, alpha=alpha, temperature=1.0)(StudentOutput.of_logits(student), nothing, empty)
    terms.total.backward()
    assert terms.total == 0 and terms.positions == 0
    assert student.grad is not None and student.grad.eq(0).all()


def test_a_temperature_off_the_grid_is_refused_with_the_grid() -> None:
    with pytest.raises(CacheError, match=r"temperature 3 .*\(1, 2, 4\).*precompute"):
        _objective(4, alpha=0.9, temperature=3.0)


def test_a_tail_policy_that_the_cache_cannot_serve_is_refused() -> None:
    with pytest.raises(CacheError, match=r"tail is sketch.*ghost, uniform, renormalise or auto.*head\+sketch"):
        _objective(4, tail="sketch")


def test_without_a_sketch_auto_means_ghost() -> None:
    student, columns = _logits(1).view(B, S, V), _columns(_logits(0, N), 4)
    auto, ghost = (
        _objective(4, tail=tail)(StudentOutput.of_logits(student), LABELS, columns).total for tail in ("auto", "ghost")
    )
    assert auto == ghost


def test_reverse_kl_against_a_renormalised_head_is_refused() -> None:
    data = {"cache": "c", "objective": {"divergence": "reverse-kl", "tail": "renormalise"}}
    with pytest.raises(RecipeError, match=r"reverse-kl is infinite.*tail: ghost or uniform"):
        parse_recipe(data, origin="r.yaml")


@pytest.mark.parametrize("mixing", [0, 1])
def test_a_mixture_of_one_side_alone_is_refused(mixing: float) -> None:
    with pytest.raises(RecipeError, match=r"objective.mixing"):
        parse_recipe({"cache": "c", "objective": {"mixing": mixing}}, origin="r.yaml")


def test_a_student_with_too_few_tokens_is_refused() -> None:
    with pytest.raises(ModelError, match=r"predicts 30 tokens.*has 40"):
        _objective(4)(StudentOutput.of_logits(_logits(1).view(B, S, V)[..., :30]), LABELS, _columns(_logits(0, N), 4))


def test_targets_of_another_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="misaligned"):
        _objective(4)(
            StudentOutput.of_logits(_logits(1).view(B, S, V)), LABELS, _columns(_logits(0, 4), 4, labels=LABELS[:, :4])
        )
