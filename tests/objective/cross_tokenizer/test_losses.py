"""Losses across tokenizers: naive twins, equal vocabularies, and gradients through blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from teachercache.objective.cross_tokenizer.batch import Chunks
from teachercache.objective.cross_tokenizer.chunk_likelihood import ChunkLikelihood, binary_kl
from teachercache.objective.cross_tokenizer.projected_kl import ProjectedKL, VocabularyProjection
from teachercache.objective.cross_tokenizer.softmax import conditioned_kl, label_terms
from teachercache.objective.cross_tokenizer.sorted_probabilities import SortedProbabilities
from teachercache.objective.cross_tokenizer.sums import Batch, across_sums, across_sums_of_logits
from teachercache.targets.logits.softened import Softened, UniformTail

TEACHER, STUDENT, WIDTH, POSITIONS = 23, 17, 8, 11


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


class DenseTail:
    """Every token's share, as a sketch gives it."""

    def __init__(self, logits_NU: Tensor) -> None:
        self.logits_NU = logits_NU

    def logits(self, part: slice, xp: Any) -> Any:
        return self.logits_NU[part].clone()

    def at(self, part: slice) -> DenseTail:
        return DenseTail(self.logits_NU[part])


def teacher_of(logits_NU: Tensor, *, k: int, tail: bool) -> Softened:
    log_prob_NU = logits_NU.log_softmax(-1)
    head_Nk, ids_Nk = log_prob_NU.topk(k)
    rest_N = (1 - head_Nk.exp().sum(-1)).clamp_min(1e-12).log()
    return Softened(ids_Nk, head_Nk, rest_N, DenseTail(logits_NU) if tail else None)


def identity(size: int) -> VocabularyProjection:
    return VocabularyProjection(torch.arange(size), torch.ones(size, dtype=torch.bool))


def some_map(generator: torch.Generator) -> VocabularyProjection:
    """Many to one, with tokens on both sides that have none."""
    first_U = torch.randint(0, STUDENT - 4, (TEACHER,), generator=generator)
    first_U[[2, 9]] = -1
    emitted_V = torch.zeros(STUDENT, dtype=torch.bool)
    emitted_V[first_U[first_U >= 0]] = True
    return VocabularyProjection(first_U, emitted_V)


def naive_projected(student_V: Tensor, teacher_U: Tensor, projection: VocabularyProjection, T: float) -> float:
    p_U, q_V = (teacher_U / T).softmax(-1).tolist(), (student_V / T).softmax(-1).tolist()
    carried = [0.0] * len(q_V)
    for token, p in enumerate(p_U):
        if int(projection.first_U[token]) >= 0:
            carried[int(projection.first_U[token])] += p
    mass_p, mass_q = sum(carried), sum(q for q, is_in in zip(q_V, projection.emitted_V.tolist(), strict=True) if is_in)
    return sum(p / mass_p * np.log(p / mass_p * mass_q / q) for p, q in zip(carried, q_V, strict=True) if p > 0)


@pytest.mark.parametrize("T", [1.0, 2.5])
def test_projected_kl_is_the_kl_of_what_both_can_emit(generator: torch.Generator, T: float) -> None:
    projection = some_map(generator)
    student_NV = torch.randn(5, STUDENT, generator=generator, dtype=torch.float64)
    teacher_NU = torch.randn(5, TEACHER, generator=generator, dtype=torch.float64)
    term = ProjectedKL(projection, temperature=T)
    values, measured = term.values(student_NV, teacher_of(teacher_NU / T, k=4, tail=True))
    wanted = [naive_projected(s, t, projection, T) for s, t in zip(student_NV, teacher_NU, strict=True)]
    np.testing.assert_allclose(values.numpy(), wanted, rtol=1e-9)
    unmapped = (teacher_NU / T).softmax(-1)[:, [2, 9]].sum(-1)
    unreachable = (student_NV / T).softmax(-1)[:, ~projection.emitted_V].sum(-1)
    np.testing.assert_allclose(measured["unmapped"].numpy(), unmapped.numpy(), rtol=1e-6)
    np.testing.assert_allclose(measured["unreachable"].numpy(), unreachable.numpy(), rtol=1e-6)
    assert term.weight == T**2


@pytest.mark.parametrize("tail", [True, False])
def test_projected_kl_does_not_push_tokens_that_the_teacher_cannot_emit(generator: torch.Generator, tail: bool) -> None:
    projection = some_map(generator)
    student_NV = torch.randn(5, STUDENT, generator=generator, requires_grad=True)
    teacher = teacher_of(torch.randn(5, TEACHER, generator=generator), k=4, tail=tail)
    ProjectedKL(projection).values(student_NV, teacher)[0].sum().backward()
    assert student_NV.grad is not None
    assert student_NV.grad[:, ~projection.emitted_V].abs().max() < 1e-7
    assert student_NV.grad[:, projection.emitted_V].abs().max() > 1e-3


@pytest.mark.parametrize("tail", [True, False])
def test_with_equal_vocabularies_projected_kl_is_kl(generator: torch.Generator, tail: bool) -> None:
    student_NV, teacher_NU = (torch.randn(6, TEACHER, generator=generator, dtype=torch.float64) for _ in range(2))
    teacher = teacher_of(teacher_NU, k=5, tail=tail)
    values, measured = ProjectedKL(identity(TEACHER)).values(student_NV, teacher)
    p, q = teacher_NU.softmax(-1), student_NV.softmax(-1)
    if tail:
        wanted = (p * (p.log() - q.log())).sum(-1)
    else:
        p, q = (torch.cat([each.gather(1, teacher.head_ids_Nk), each.new_zeros(6, 1)], 1) for each in (p, q))
        p[:, -1], q[:, -1] = 1 - p.sum(-1), 1 - q.sum(-1)
        wanted = (p * (p.log() - q.log())).sum(-1)
    np.testing.assert_allclose(values.numpy(), wanted.numpy(), rtol=1e-6)
    assert measured["unmapped"].abs().max() < 1e-9 and measured["unreachable"].abs().max() < 1e-9


def test_a_head_whose_tokens_meet_is_one_outcome(generator: torch.Generator) -> None:
    projection = VocabularyProjection(torch.tensor([1, 1, 2, -1]), torch.tensor([False, True, True, True]))
    student_NV = torch.randn(1, 4, generator=generator, dtype=torch.float64)
    teacher_NU = torch.tensor([[2.0, 1.5, 1.0, 0.5]], dtype=torch.float64)
    values, measured = ProjectedKL(projection).values(student_NV, teacher_of(teacher_NU, k=4, tail=False))
    p, q = teacher_NU.softmax(-1)[0], student_NV.softmax(-1)[0]
    among = 1 - q[0]  # which the teacher cannot emit, as the student cannot p[3]
    outcomes = [((p[0] + p[1]) / (1 - p[3]), q[1] / among), (p[2] / (1 - p[3]), q[2] / among)]
    np.testing.assert_allclose(float(values[0]), sum(float(a * (a / b).log()) for a, b in outcomes), rtol=1e-6)
    assert float(measured["unmapped"][0]) == pytest.approx(float(p[3]))


def test_sorted_probabilities_with_equal_vocabularies_is_the_sorted_l1(generator: torch.Generator) -> None:
    student_NV, teacher_NU = (torch.randn(6, TEACHER, generator=generator, dtype=torch.float64) for _ in range(2))
    values, _ = SortedProbabilities().values(student_NV, teacher_of(teacher_NU, k=5, tail=True))
    p, q = (np.sort(each.softmax(-1).numpy(), axis=-1)[:, ::-1] for each in (teacher_NU, student_NV))
    np.testing.assert_allclose(values.numpy(), np.abs(p - q).sum(-1), rtol=1e-6)


@pytest.mark.parametrize("vocabulary", [STUDENT, TEACHER + 5])
def test_sorted_probabilities_fill_the_shorter_side_up(generator: torch.Generator, vocabulary: int) -> None:
    student_NV = torch.randn(3, vocabulary, generator=generator, dtype=torch.float64)
    teacher_NU = torch.randn(3, TEACHER, generator=generator, dtype=torch.float64)
    values, _ = SortedProbabilities().values(student_NV, teacher_of(teacher_NU, k=5, tail=True))
    size = max(vocabulary, TEACHER)
    p, q = (np.sort(np.pad(each.softmax(-1).numpy(), ((0, 0), (0, size - each.shape[1]))))[:, ::-1]
            for each in (teacher_NU, student_NV))  # fmt: skip
    np.testing.assert_allclose(values.numpy(), np.abs(p - q).sum(-1), rtol=1e-6)


def chunks_of(counts: list[int], log_prob: list[float], *, first: int = 0, positions: int = POSITIONS) -> Chunks:
    """Chunks of so many tokens, one after the other, from position `first` on."""
    starts = np.cumsum([first, *counts])
    of_N = np.full(positions, len(counts))
    for number, count in enumerate(counts):
        of_N[starts[number] : starts[number] + count] = number
    last = [int(end) if end < positions else positions for end in starts[1:]]
    boundary = [-0.3 if end < positions else 0.0 for end in last]
    return Chunks(
        torch.tensor(starts[:-1]), torch.tensor(last), torch.tensor(of_N), torch.tensor(log_prob, dtype=torch.float64),
        torch.tensor(boundary, dtype=torch.float64),
    )  # fmt: skip


def test_with_equal_vocabularies_chunk_likelihood_is_the_binarised_kl_of_the_actual_token(
    generator: torch.Generator,
) -> None:
    logits_NV, teacher_NU = (torch.randn(POSITIONS, TEACHER, generator=generator).double() for _ in range(2))
    labels_N = torch.randint(0, TEACHER, (POSITIONS,), generator=generator)
    log_p = teacher_NU.log_softmax(-1).gather(1, labels_N[:, None])[:, 0]
    chunks = chunks_of([1] * POSITIONS, log_p.tolist())
    batch = Batch(labels_N, chunks, [], [], [ChunkLikelihood(tau=1.0, boundaries=False)], None, 1.0)
    found = across_sums_of_logits(logits_NV, batch)
    p, q = log_p.exp(), logits_NV.log_softmax(-1).gather(1, labels_N[:, None])[:, 0].exp()
    wanted = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum()
    assert float(found.named["chunk-likelihood"]) == pytest.approx(float(wanted), rel=1e-9)


def test_a_chunk_is_as_likely_as_its_tokens_and_what_may_follow(generator: torch.Generator) -> None:
    logits_NV = torch.randn(POSITIONS, STUDENT, generator=generator).double()
    labels_N = torch.randint(0, STUDENT, (POSITIONS,), generator=generator)
    begins_V = torch.rand(STUDENT, generator=generator) < 0.5
    counts, log_prob = [2, 1, 3], [-4.0, -1.5, -7.0]
    chunks = chunks_of(counts, log_prob, first=1)
    batch = Batch(labels_N, chunks, [], [], [ChunkLikelihood(tau=3.0)], begins_V, 1.0)
    found = across_sums_of_logits(logits_NV, batch)
    log_q = logits_NV.log_softmax(-1)
    wanted, place = 0.0, 1
    for count, log_p in zip(counts, log_prob, strict=True):
        inside = sum(float(log_q[place + i, labels_N[place + i]]) for i in range(count))
        place += count
        after = float(log_q[place, begins_V].logsumexp(-1))
        p, q = np.exp((log_p - 0.3) / 3.0), np.exp((inside + after) / 3.0)
        wanted += 3.0 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    assert float(found.named["chunk-likelihood"]) == pytest.approx(wanted, rel=1e-9)


def test_binary_kl_is_zero_where_both_agree_and_finite_where_one_is_certain() -> None:
    log_p = torch.tensor([-1e-9, -0.1, -5.0, -80.0], dtype=torch.float64, requires_grad=True)
    log_q = torch.tensor([-80.0, -0.1, -1e-9, 0.0], dtype=torch.float64, requires_grad=True)
    values = binary_kl(log_p, log_q)
    values.sum().backward()
    assert values[1] == 0 and torch.isfinite(values).all() and log_q.grad is not None
    assert torch.isfinite(log_q.grad).all() and (values >= 0).all()


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("ruled_out", [False, True])
def test_columns_beyond_the_vocabulary_are_compared_with_a_teacher_that_gives_them_nothing(
    generator: torch.Generator, tail: bool, ruled_out: bool
) -> None:
    """Not so tokens that only several of the teacher's spell."""
    projection = some_map(generator).padded(STUDENT + 3)
    teacher = teacher_of(torch.randn(4, TEACHER, generator=generator).double(), k=5, tail=tail)
    logits_NV = torch.randn(4, STUDENT + 3, generator=generator).double()
    if ruled_out:
        logits_NV[:, STUDENT:] = torch.finfo(torch.float32).min  # by the student itself
    logits_NV.requires_grad_()
    values_N, measured = ProjectedKL(projection).values(logits_NV, teacher)
    compared = projection.emitted_V | (torch.arange(STUDENT + 3) >= STUDENT)
    q_NV = logits_NV.masked_fill(~compared, -torch.inf).softmax(-1)
    wanted_N = []
    for n in range(4):
        p_U = teacher.dense()[n].exp() if tail else torch.zeros(TEACHER).double()
        if not tail:
            p_U[teacher.head_ids_Nk[n]] = teacher.head_log_prob_Nk[n].exp()
        mapped = projection.first_U >= 0
        p_V = torch.zeros(STUDENT + 3).double().index_add(0, projection.first_U[mapped], p_U[mapped])
        rest = 0.0 if tail else teacher.tail_log_prob_N[n].exp()
        p_V, rest = p_V / (p_V.sum() + rest), rest / (p_V.sum() + rest)
        value = (p_V[p_V > 0] * (p_V[p_V > 0] / q_NV[n, p_V > 0]).log()).sum()
        if not tail:
            others = compared & (p_V == 0) & (torch.arange(STUDENT + 3) < STUDENT)
            value = value + rest * (rest / q_NV[n, others].sum()).log()
        wanted_N.append(value)
    torch.testing.assert_close(values_N, torch.stack(wanted_N), rtol=1e-9, atol=1e-12)
    mine, theirs = (torch.autograd.grad(each.sum(), logits_NV)[0] for each in (values_N, torch.stack(wanted_N)))
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-12)
    assert ruled_out or mine[:, STUDENT:].gt(0).all()
    unreachable_N = logits_NV.softmax(-1)[:, ~compared].sum(-1)
    torch.testing.assert_close(measured["unreachable"], unreachable_N.detach())


def whole_batch(generator: torch.Generator, *, tail: bool, columns: int = STUDENT) -> Batch:
    projection = some_map(generator).padded(columns)
    labels_N = torch.randint(0, STUDENT, (POSITIONS,), generator=generator)
    chunks = chunks_of([2, 1, 3, 1], [-4.0, -1.5, -7.0, -2.0], first=2)
    teacher = teacher_of(torch.randn(4, TEACHER, generator=generator).double(), k=4, tail=tail)
    begins_V = torch.nn.functional.pad(torch.rand(STUDENT, generator=generator) < 0.5, (0, columns - STUDENT))
    pair_terms = [ProjectedKL(projection, weight=0.7), SortedProbabilities(0.4)]
    chunk_terms = [ChunkLikelihood(weight=1.3, tau=5.0)]
    return Batch(labels_N, chunks, pair_terms, [teacher, teacher], chunk_terms, begins_V, 0.6)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_blocks_of_positions_give_what_autograd_gives_of_all_logits(
    generator: torch.Generator, tail: bool, softcap: float | None, rows: int
) -> None:
    batch = whole_batch(generator, tail=tail, columns=STUDENT + 2)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator).double().requires_grad_()
        for shape in ((POSITIONS, WIDTH), (STUDENT + 2, WIDTH), (STUDENT + 2,))
    )
    logits = hidden @ weight.T + bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    wanted = across_sums_of_logits(logits, batch)
    gradients = torch.autograd.grad(wanted.total, (hidden, weight, bias))
    size = rows * 4 * (STUDENT + 2)
    found = across_sums(hidden, weight, bias, batch, softcap=softcap, chunk_bytes=size)
    assert float(found.total) == pytest.approx(float(wanted.total), rel=1e-9)
    assert {name: float(value) for name, value in found.named.items()} == pytest.approx(
        {name: float(value) for name, value in wanted.named.items()}, rel=1e-9
    )
    for ours, theirs in zip(torch.autograd.grad(2 * found.total, (hidden, weight, bias)), gradients, strict=True):
        torch.testing.assert_close(ours, 2 * theirs, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        again = across_sums(hidden, weight, bias, batch, softcap=softcap, chunk_bytes=size)
    assert float(again.total) == pytest.approx(float(wanted.total), rel=1e-9)


def test_no_positions_give_zero_that_reaches_every_weight(generator: torch.Generator) -> None:
    nothing = Chunks(*(torch.zeros(0, dtype=torch.long) for _ in range(3)), torch.zeros(0), torch.zeros(0))
    teacher = teacher_of(torch.zeros(0, TEACHER), k=4, tail=True)
    terms = [ProjectedKL(some_map(generator))]
    begins_V = torch.ones(STUDENT, dtype=torch.bool)
    batch = Batch(torch.zeros(0, dtype=torch.long), nothing, terms, [teacher], [ChunkLikelihood()], begins_V, 0.6)
    hidden, weight = torch.zeros(0, WIDTH, requires_grad=True), torch.ones(STUDENT, WIDTH, requires_grad=True)
    found = across_sums(hidden, weight, None, batch)
    found.total.backward()
    assert float(found.total.detach()) == 0.0 and weight.grad is not None and not weight.grad.any()


def test_uniform_tails_are_carried_over_too(generator: torch.Generator) -> None:
    projection = some_map(generator)
    log_prob = torch.randn(2, TEACHER, generator=generator).log_softmax(-1)
    head_Nk, ids_Nk = log_prob.topk(3)
    rest_N = (1 - head_Nk.exp().sum(-1)).log()
    teacher = Softened(ids_Nk, head_Nk, rest_N, UniformTail(TEACHER, head_Nk))
    student_NV = torch.randn(2, STUDENT, generator=generator)
    values, _ = ProjectedKL(projection).values(student_NV, teacher)
    wanted = [naive_projected(s, t, projection, 1.0) for s, t in zip(student_NV, teacher.dense(), strict=True)]
    np.testing.assert_allclose(values.numpy(), wanted, rtol=1e-4)


def test_gradients_in_closed_form_are_those_of_finite_differences(generator: torch.Generator) -> None:
    logits_CV = (3 * torch.randn(4, STUDENT, generator=generator).double()).requires_grad_()
    labels_C = torch.randint(0, STUDENT, (4,), generator=generator)
    begins_V, among_V = torch.rand(STUDENT, generator=generator) < 0.5, torch.rand(STUDENT, generator=generator) < 0.7
    target_CV = torch.rand(4, STUDENT, generator=generator).double() * among_V
    target_CV /= target_CV.sum(-1, keepdim=True)
    target_CV[3] = 0
    assert torch.autograd.gradcheck(lambda z: label_terms(z, labels_C, begins_V), (logits_CV,))
    assert torch.autograd.gradcheck(lambda z: label_terms(z, labels_C, None)[0], (logits_CV,))
    assert torch.autograd.gradcheck(lambda z: conditioned_kl(z, target_CV, among_V)[0], (logits_CV,))
    ce_C, log_mass_C = label_terms(logits_CV, labels_C, begins_V)
    torch.testing.assert_close(ce_C, torch.nn.functional.cross_entropy(logits_CV, labels_C, reduction="none"))
    torch.testing.assert_close(log_mass_C, logits_CV.log_softmax(-1)[:, begins_V].logsumexp(-1))


def test_a_set_without_mass_stays_finite() -> None:
    logits_CV = torch.tensor([[0.0, -200.0, -200.0]], requires_grad=True)
    _, log_mass_C = label_terms(logits_CV, torch.tensor([0]), torch.tensor([False, True, True]))
    values = ChunkLikelihood().values(torch.tensor([-1.0]), log_mass_C, chunks_of([1], [-2.0], positions=2))
    values.sum().backward()
    assert torch.isfinite(values).all() and logits_CV.grad is not None and torch.isfinite(logits_CV.grad).all()
