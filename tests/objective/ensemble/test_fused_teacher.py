"""Fusion of several teachers against a naive dense twin in float64, and how they are weighted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teachercache.config import ObjectiveConfig, TeachersConfig
from teachercache.errors import CacheError, RecipeError
from teachercache.objective import DistillationObjective
from teachercache.objective.cross_tokenizer.projected_kl import VocabularyProjection
from teachercache.objective.ensemble import EnsembleMember, FusedTeacher, TeacherWeights
from teachercache.objective.ensemble.fused_tail import FusedTail
from teachercache.objective.ensemble.teacher_view import TeacherView
from teachercache.objective.ensemble.weights import by_confidence, shared_out
from teachercache.objective.logits.divergences import Divergence, JensenShannon, forward_kl, reverse_kl, total_variation
from teachercache.objective.logits.fused import distillation_sums
from teachercache.objective.logits.operands import Weights
from teachercache.objective.logits.projected import projected_sums
from teachercache.objective.logits.student_output import StudentOutput
from teachercache.objective.token_weighting.weights import position_weights
from teachercache.targets import Full, RandomSampling, TopK
from teachercache.targets.logits.softened import SketchTail, Softened, UniformTail

V, U, N, RANK = 40, 33, 37, 5
PLACE: dict[str, Any] = {"like": torch.empty(0), "dtype": torch.float32}
DIVERGENCES = [forward_kl, reverse_kl, JensenShannon(), total_variation]
POLICIES = ("sketch", "uniform", "renormalise", "full")


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _softened(seed: int, policy: str, k: int, temperature: float, *, positions: int = N, tokens: int = V) -> Softened:
    """A head that is exact, and a tail with the rest of the mass; some positions have padding in their head."""
    logits_NV = torch.randn(positions, tokens, generator=_generator(seed), dtype=torch.float64) * 2 / temperature
    if policy == "full":
        ids_NV = torch.arange(tokens).expand(positions, tokens)
        return Softened(ids_NV, logits_NV.log_softmax(-1), torch.full((positions,), -math.inf, dtype=torch.float64))
    log_p_NV = logits_NV.log_softmax(-1)
    head_Nk, ids_Nk = log_p_NV.topk(k)
    if k > 1:  # padding
        ids_Nk[::3, -1], head_Nk[::3, -1] = ids_Nk[::3, 0], -math.inf
    tail_N = torch.log1p(-head_Nk.exp().sum(-1))
    softened = Softened(ids_Nk, head_Nk, tail_N)
    if policy == "renormalise":
        return softened.renormalised()
    if policy == "uniform":
        return softened.with_tail(UniformTail(tokens, head_Nk))
    coefficients = torch.randn(positions, RANK, generator=_generator(seed + 50), dtype=torch.float64) / temperature
    basis = torch.randn(tokens, RANK, generator=_generator(seed + 60), dtype=torch.float64)
    return softened.with_tail(SketchTail(coefficients, basis, torch.zeros(tokens, dtype=torch.float64)))


def _to(softened: Softened, dtype: torch.dtype) -> Softened:
    tail: Any = softened.tail
    if isinstance(tail, SketchTail):
        tail = SketchTail(*(each.to(dtype) for each in (tail.coefficients_Nr, tail.basis_Vr, tail.offset_V)))
    elif isinstance(tail, UniformTail):
        tail = UniformTail(tail.vocabulary_size, tail.like.to(dtype))
    return Softened(softened.head_ids_Nk, softened.head_log_prob_Nk.to(dtype), softened.tail_log_prob_N.to(dtype), tail)


def _dense(softened: Softened, tokens: int) -> Tensor:
    """p of every token, as plainly as it can be written."""
    if softened.tail is not None:
        return softened.dense().exp()
    p_NV = torch.zeros(len(softened), tokens, dtype=torch.float64)
    for row, (ids, log_probs) in enumerate(
        zip(softened.head_ids_Nk.tolist(), softened.head_log_prob_Nk.tolist(), strict=True)
    ):
        for token, log_prob in zip(ids, log_probs, strict=True):
            p_NV[row, token] += math.exp(log_prob)
    return p_NV


def _twin(ps: list[Tensor], weight_NK: Tensor, fusion: str) -> Tensor:
    if fusion == "arithmetic":
        return sum(weight_NK[:, i, None] * p_NV for i, p_NV in enumerate(ps))  # type: ignore[return-value]
    log_NV = sum(weight_NK[:, i, None] * p_NV.log().clamp_min(-103) for i, p_NV in enumerate(ps))
    return log_NV.softmax(-1)  # type: ignore[union-attr]


def _weights(seed: int, count: int) -> Tensor:
    return torch.rand(N, count, generator=_generator(seed), dtype=torch.float64).softmax(-1)


def _fused(teacher_views: list[TeacherView], weight_NK: Tensor, fusion: str) -> Softened:
    none_N0 = torch.empty(len(weight_NK), 0)
    taught_N = weight_NK.sum(-1).gt(0).to(weight_NK.dtype).log()
    return Softened(
        none_N0.long(), none_N0.to(weight_NK.dtype), taught_N, FusedTail(teacher_views, weight_NK, fusion, V)
    )


@pytest.mark.parametrize("fusion", ["arithmetic", "geometric"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_fusion_is_that_of_dense_teachers(fusion: str, temperature: float, data: st.DataObject) -> None:
    """Two or three teachers of any kinds and head sizes, each but the first at some of the positions."""
    policies = [each for each in POLICIES if fusion == "arithmetic" or each != "renormalise"]
    count = data.draw(st.integers(2, 3))
    teacher_views, ps, speaks_NK = [], [], torch.ones(N, count, dtype=torch.bool)
    for number in range(count):
        policy, k = data.draw(st.sampled_from(policies)), data.draw(st.integers(1, 9))
        at_N = torch.ones(N, dtype=torch.bool)
        if number:
            at_N = torch.rand(N, generator=_generator(data.draw(st.integers(0, 9)))) < data.draw(
                st.sampled_from([0.0, 0.5, 1.0])
            )
        at_n = at_N.nonzero()[:, 0]
        softened = _softened(number, policy, k, temperature, positions=len(at_n))
        p_NV = torch.ones(N, V, dtype=torch.float64)
        p_NV[at_n] = _dense(softened, V)
        teacher_views.append(TeacherView.of(softened, at_n if number else None, positions=N))
        ps.append(p_NV)
        speaks_NK[:, number] = at_N
    weight_NK = shared_out(_weights(9, count), speaks_NK)
    fused = _fused(teacher_views, weight_NK, fusion)
    torch.testing.assert_close(fused.dense().exp(), _twin(ps, weight_NK, fusion), rtol=1e-6, atol=1e-9)
    start = data.draw(st.integers(0, N - 1))
    part = slice(start, start + data.draw(st.integers(1, N)))
    torch.testing.assert_close(fused.at(part).dense(), fused.dense(part), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=["kl", "reverse", "js", "tv"])
@pytest.mark.parametrize("fusion", ["arithmetic", "geometric"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_losses_and_gradients_are_those_of_the_dense_mixture(
    divergence: Divergence, fusion: str, temperature: float
) -> None:
    """Through the loss that training takes, from logits and inside the output layer, in float32."""
    said = [_softened(0, "sketch", 6, temperature), _softened(1, "uniform", 3, temperature)]
    weight_NK = _weights(3, 2)
    p_NV = _twin([_dense(each, V) for each in said], weight_NK, fusion)
    teacher_views = [TeacherView.of(_to(each, torch.float32), None, positions=N) for each in said]
    fused = _fused(teacher_views, weight_NK.float(), fusion)
    hidden_ND = torch.randn(N, 8, generator=_generator(5)).requires_grad_()
    layer_VD = torch.randn(V, 8, generator=_generator(6)).requires_grad_()
    labels_N = torch.arange(N) % V
    q_NV = (hidden_ND.double() @ layer_VD.double().T / temperature).log_softmax(-1)
    value_NV, _ = divergence(p_NV, p_NV.log(), q_NV.exp(), q_NV)
    ce = F.cross_entropy(hidden_ND.double() @ layer_VD.double().T, labels_N, reduction="sum")
    # `value_NV` carries no gradient of its own where a divergence gives its pull in closed form: take it from the formula.
    expected = _value(divergence, p_NV, q_NV).sum()
    torch.testing.assert_close(value_NV.sum(), expected)
    total = 0.7 * temperature**2 * expected + 0.3 * ce
    wanted = torch.autograd.grad(total, (hidden_ND, layer_VD))
    weights = Weights(0.7, temperature)
    from_logits = distillation_sums(
        (hidden_ND @ layer_VD.T)[None], positions_N=torch.arange(N), labels_N=labels_N, teacher=fused, weights=weights,
        vocabulary_size=V, divergence=divergence, block_bytes=7 * V * 4,
    )  # fmt: skip
    in_layer = projected_sums(
        hidden_ND, layer_VD, None, labels_N=labels_N, teacher=fused, weights=weights, vocabulary_size=V,
        divergence=divergence, chunk_bytes=5 * V * 4,
    )  # fmt: skip
    for sums in (from_logits, in_layer):
        torch.testing.assert_close(sums[0], total.float(), rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(torch.autograd.grad(sums[0], (hidden_ND, layer_VD)), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-4)


def _value(divergence: Divergence, p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    q_NV = log_q_NV.exp()
    if divergence is forward_kl:
        return p_NV * (p_NV.log() - log_q_NV)
    if divergence is reverse_kl:
        return q_NV * (log_q_NV - p_NV.log())
    if divergence is total_variation:
        return (p_NV - q_NV).abs() / 2
    mixed_NV = (p_NV + q_NV) / 2
    return (p_NV * (p_NV / mixed_NV).log() + q_NV * (q_NV / mixed_NV).log()) / 2


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=["kl", "reverse", "js", "tv"])
def test_a_position_without_a_weight_has_no_teacher(divergence: Divergence) -> None:
    """Its labels still count."""
    teacher_views = [TeacherView.of(_softened(seed, "sketch", 4, 2.0), None, positions=N) for seed in (0, 1)]
    weight_NK = _weights(3, 2)
    weight_NK[::2] = 0
    logits_NV = torch.randn(N, V, generator=_generator(7), dtype=torch.float64).requires_grad_()
    labels_N = torch.arange(N) % V

    def sums(weight_NK: Tensor, chosen: Tensor, alpha: float) -> tuple[Tensor, ...]:
        at = [
            TeacherView.of(_rows(teacher_view.softened, chosen), None, positions=len(chosen))
            for teacher_view in teacher_views
        ]
        return distillation_sums(
            logits_NV[None], positions_N=chosen, labels_N=labels_N[chosen], teacher=_fused(at, weight_NK[chosen], "arithmetic"),
            weights=Weights(alpha, 2.0), vocabulary_size=V, divergence=divergence,
        )  # fmt: skip

    every, taught, rest = torch.arange(N), torch.arange(1, N, 2), torch.arange(0, N, 2)
    total, value, ce = sums(weight_NK, every, 0.6)
    of_taught = sums(weight_NK, taught, 0.6)
    ce_of_rest = F.cross_entropy(logits_NV[rest], labels_N[rest], reduction="sum")
    torch.testing.assert_close(value, of_taught[1])
    torch.testing.assert_close(total, of_taught[0] + 0.4 * ce_of_rest)
    (gradient,) = torch.autograd.grad(total, logits_NV)
    (wanted,) = torch.autograd.grad(of_taught[0] + 0.4 * ce_of_rest, logits_NV)
    torch.testing.assert_close(gradient, wanted)
    assert torch.isfinite(gradient).all() and ce > of_taught[2]


def _rows(softened: Softened, chosen: Tensor) -> Softened:
    tail: Any = softened.tail
    tail = SketchTail(tail.coefficients_Nr[chosen], tail.basis_Vr, tail.offset_V)
    head = softened.head_ids_Nk[chosen], softened.head_log_prob_Nk[chosen]
    return Softened(*head, softened.tail_log_prob_N[chosen], tail)


@pytest.mark.parametrize("fusion", ["arithmetic", "geometric"])
@pytest.mark.parametrize("policy", ["sketch", "uniform"])
def test_one_teacher_of_weight_one_is_no_fusion(fusion: str, policy: str) -> None:
    """Through the general path, whatever the other one says."""
    alone = _to(_softened(0, policy, 5, 2.0), torch.float32)
    other = _to(_softened(1, "sketch", 3, 2.0), torch.float32)
    weight_NK = torch.tensor([[1.0, 0.0]]).expand(N, 2)
    fused = _fused([TeacherView.of(each, None, positions=N) for each in (alone, other)], weight_NK, fusion)
    logits_NV = torch.randn(N, V, generator=_generator(7)).requires_grad_()
    found = []
    for teacher in (alone, fused):
        total, kl, _ = distillation_sums(
            logits_NV[None], positions_N=torch.arange(N), labels_N=torch.arange(N) % V, teacher=teacher,
            weights=Weights(0.7, 2.0), vocabulary_size=V,
        )  # fmt: skip
        found.append((kl / N, *torch.autograd.grad(total / N, logits_NV)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------- another vocabulary


def _projection() -> VocabularyProjection:
    """Some of the teacher's tokens have no token of the student's, several share one, and the student has longer ones."""
    first_U = torch.randint(0, 25, (U,), generator=_generator(8))
    first_U[::7] = -1
    emitted_V = torch.zeros(V, dtype=torch.bool)
    emitted_V[first_U[first_U >= 0]] = True
    return VocabularyProjection(first_U, emitted_V)


def _completed(p_nU: Tensor, base_nV: Tensor, projection: VocabularyProjection) -> Tensor:
    """p̂, a token at a time."""
    completed_nV = base_nV.clone()
    for row in range(len(p_nU)):
        said = [0.0] * V
        for token, first in enumerate(projection.first_U.tolist()):
            if first >= 0:
                said[first] += float(p_nU[row, token])
        emitted = [token for token in range(V) if projection.emitted_V[token]]
        mass = sum(float(base_nV[row, token]) for token in emitted)
        for token in emitted:
            completed_nV[row, token] = mass * said[token] / sum(said)
    return completed_nV


@pytest.mark.parametrize("fusion", ["arithmetic", "geometric"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("natives", [1, 2])
def test_a_teacher_with_other_tokens_speaks_of_what_it_can_emit(fusion: str, temperature: float, natives: int) -> None:
    own = [_softened(seed, "sketch", 4 + seed, temperature) for seed in range(natives)]
    at_n = torch.arange(0, N, 3)
    other = _softened(7, "uniform", 5, temperature, positions=len(at_n), tokens=U)
    weight_NK = _weights(3, natives + 1)
    speaks_NK = torch.ones(N, natives + 1, dtype=torch.bool)
    speaks_NK[:, -1] = False
    speaks_NK[at_n, -1] = True
    weight_NK = shared_out(weight_NK, speaks_NK)
    ps = [_dense(each, V) for each in own]
    of_natives = weight_NK[:, :natives] / weight_NK[:, :natives].sum(-1, keepdim=True)
    base_NV = _twin(ps, of_natives, fusion)
    completed_NV = base_NV.clone()
    completed_NV[at_n] = _completed(_dense(other, U), base_NV[at_n], _projection())
    teacher_views = [TeacherView.of(each, None, positions=N) for each in own]
    teacher_views.append(TeacherView.of(other, at_n, positions=N, projection=_projection()))
    fused = _fused(teacher_views, weight_NK, fusion).dense().exp()
    torch.testing.assert_close(fused, _twin([*ps, completed_NV], weight_NK, fusion), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(completed_NV.sum(-1), torch.ones(N, dtype=torch.float64))
    outside_V = ~_projection().emitted_V
    if fusion == "arithmetic":  # what it cannot emit keeps its probability
        torch.testing.assert_close(fused[:, outside_V], base_NV[:, outside_V], rtol=1e-6, atol=1e-9)


# --------------------------------------------------------------------- weights


def test_confidence_is_ca_mkds_formula() -> None:
    nats_NK = torch.tensor([[0.5, 2.0, 1.0], [3.0, 0.1, 9.0], [1.0, 2.0, 5.0]], dtype=torch.float64)
    speaks_NK = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    weight_NK = by_confidence(nats_NK, speaks_NK)
    z = [math.exp(nats) for nats in (0.5, 2.0, 1.0)]
    assert weight_NK[0].tolist() == pytest.approx([(1 - each / sum(z)) / 2 for each in z])
    p = math.exp(-3.0), math.exp(-0.1)  # two teachers: each by its probability of the token
    assert weight_NK[1].tolist() == pytest.approx([p[0] / sum(p), p[1] / sum(p), 0])
    assert weight_NK[2].tolist() == [1, 0, 0]
    torch.testing.assert_close(weight_NK.sum(-1), torch.ones(3, dtype=torch.float64))


def test_shares_follow_losses_and_their_state_comes_back() -> None:
    weights = TeacherWeights(3, tau=0.5, adapts=True)
    assert weights.factors == (1, 1, 1)
    weights.update([1.0, 1.5, 3.0])
    z = [math.exp(-loss / 0.5) for loss in (1.0, 1.5, 3.0)]
    assert weights.factors == pytest.approx([each / sum(z) for each in z])
    again = TeacherWeights(3)
    again.load_state_dict(weights.state_dict())
    assert again.factors == weights.factors
    weights.update([1000.0, 2000.0, 3000.0])  # no underflow to a sum of nothing
    assert weights.factors == (1, 0, 0)


@pytest.mark.parametrize(
    ("given", "shares"),
    [
        ({"caches": [{"cache": "b", "weight": 0.3}]}, (0.7, 0.3)),
        ({"caches": [{"cache": "b"}, {"cache": "c"}]}, (1 / 3, 1 / 3, 1 / 3)),
        ({"weight": 0.5, "caches": [{"cache": "b"}, {"cache": "c"}]}, (0.5, 0.25, 0.25)),
        ({"weight": 0.0, "caches": [{"cache": "b"}]}, (0.0, 1.0)),
    ],
)
def test_weights_that_are_left_out_share_the_rest(given: dict[str, Any], shares: tuple[float, ...]) -> None:
    assert TeachersConfig.model_validate(given).shares() == pytest.approx(shares)


# --------------------------------------------------------------------- from the arrays of a batch


def _member(kind: Any, name: str, **given: Any) -> EnsembleMember:
    return EnsembleMember(kind, name, **given)


def _batch(kinds: list[Any], logits: list[Tensor], at: list[Tensor | None]) -> dict[str, Tensor]:
    batch: dict[str, Tensor] = {}
    for number, (kind, logits_NV, at_n) in enumerate(zip(kinds, logits, at, strict=True)):
        labels_N = torch.arange(len(logits_NV)) % V
        seeds_N = np.arange(N, dtype=np.uint64)
        decoded = kind.decoded(kind.finish(kind.capture(torch, logits_NV.clone(), labels_N, None, seeds_N)))
        tensors = {name: torch.from_numpy(values.copy()) for name, values in decoded.items()}
        tensors = {name: values.long() if values.dtype == torch.int32 else values for name, values in tensors.items()}
        if number:
            assert at_n is not None
            tensors = {name: values[at_n] for name, values in tensors.items()}
            tensors["nats"] = -tensors.pop("actual_log_prob")
            tensors["at"], tensors["has"] = at_n, torch.zeros(N, dtype=torch.bool).index_fill(0, at_n, True)
        batch |= {f"teacher{number}/{name}" if number else name: values for name, values in tensors.items()}
    return batch


def _teacher(kinds: list[Any], *, tail: str = "auto", prior: tuple[float, ...] = (), **config: Any) -> FusedTeacher:
    settings = TeachersConfig.model_validate({"caches": [{"cache": str(n)} for n in range(1, len(kinds))], **config})
    members = [_member(kind, f"cache {number}") for number, kind in enumerate(kinds)]
    shared = TeacherWeights(len(kinds), tau=settings.tau)
    objective = ObjectiveConfig.model_validate({"tail": tail})
    return FusedTeacher(members, settings, objective=objective, prior=prior or settings.shares(), shared=shared)


def test_batches_of_two_kinds_are_fused_and_missing_rows_follow_the_policy() -> None:
    kinds = [TopK(8, (1.0, 2.0), "float32", V), Full("float32", V)]
    logits = [torch.randn(N, V, generator=_generator(seed)) * 3 for seed in (0, 1)]
    at_n = torch.arange(0, N, 2)
    batch = _batch(kinds, logits, [None, at_n])
    others = _teacher(kinds, prior=(0.3, 0.7)).softened(batch, 2.0, **PLACE)
    first = kinds[0].softened({n: v for n, v in batch.items() if "/" not in n}, 2.0, tail="uniform", xp=torch)
    expected = first.dense().exp()
    expected[at_n] = 0.3 * expected[at_n] + 0.7 * (logits[1][at_n] / 2).softmax(-1)
    torch.testing.assert_close(others.dense().exp(), expected, rtol=1e-4, atol=1e-6)
    skipped = _teacher(kinds, prior=(0.3, 0.7), missing="skip").softened(batch, 2.0, **PLACE)
    torch.testing.assert_close(skipped.dense(slice(0, 1)).exp(), expected[:1], rtol=1e-4, atol=1e-6)
    assert skipped.tail_log_prob_N[::2].tolist() == [0] * len(at_n) and bool(
        (skipped.tail_log_prob_N[1::2] < -1e9).all()
    )
    teacher = _teacher(kinds, prior=(0.3, 0.7))
    sums = teacher.measured(others)
    assert sums["weight_teacher_1"].item() == pytest.approx(0.7 * len(at_n), rel=1e-5)
    assert sum(float(value) for value in sums.values()) == pytest.approx(N, rel=1e-5)


def test_where_no_other_teacher_speaks_the_first_ones_own_distribution_comes_back() -> None:
    kinds = [TopK(8, (1.0, 2.0), "float32", V), Full("float32", V)]
    logits = [torch.randn(N, V, generator=_generator(seed)) for seed in (0, 1)]
    for at_n, prior in ((torch.arange(0), (0.5, 0.5)), (torch.arange(N), (1.0, 0.0))):
        batch = _batch(kinds, logits, [None, at_n])
        teacher = _teacher(kinds, prior=prior)
        found = teacher.softened(batch, 2.0, **PLACE)
        alone = kinds[0].softened({n: v for n, v in batch.items() if "/" not in n}, 2.0, tail="uniform", xp=torch)
        assert torch.equal(found.head_ids_Nk, alone.head_ids_Nk) and isinstance(found.tail, UniformTail)
        assert torch.equal(found.head_log_prob_Nk, alone.head_log_prob_Nk)
        assert [float(value) for value in teacher.measured(found).values()] == [N, 0]


@pytest.mark.parametrize("missing", ["others", "skip"])
def test_some_of_the_positions_are_learned_from_as_they_would_be_alone(missing: str) -> None:
    kinds = [TopK(8, (1.0,), "float32", V), Full("float32", V)]
    batch = _batch(
        kinds, [torch.randn(N, V, generator=_generator(seed)) for seed in (0, 1)], [None, torch.arange(1, N, 2)]
    )
    teacher = _teacher(kinds, missing=missing, weights="confidence")
    for index_M in (torch.arange(0, N, 3), torch.arange(0, N, 2), torch.arange(0)):
        chosen = teacher.softened(teacher.chosen(batch, index_M), 1.0, **PLACE)
        every = teacher.softened(batch, 1.0, **PLACE)
        assert len(chosen) == len(index_M)
        taught_M = every.tail_log_prob_N[index_M] == 0
        torch.testing.assert_close(
            _probabilities(chosen)[taught_M], _probabilities(every)[index_M][taught_M], rtol=1e-5, atol=1e-7
        )
        if missing == "skip":
            torch.testing.assert_close(chosen.tail_log_prob_N, every.tail_log_prob_N[index_M])


def _probabilities(softened: Softened) -> Tensor:
    assert softened.tail is not None
    return softened.dense().exp() if len(softened) else torch.empty(0, V)


@pytest.mark.parametrize("by", ["student-entropy", "teacher-entropy", "entropy-gap"])
def test_hard_positions_are_those_of_the_fused_teacher(by: str) -> None:
    """The loss over the selected positions, with the weights of emphasis, and the mean weights of teachers over these."""
    kinds = [TopK(8, (1.0,), "float32", V), Full("float32", V)]
    batch = _batch(
        kinds, [torch.randn(N, V, generator=_generator(seed)) for seed in (0, 1)], [None, torch.arange(0, N, 2)]
    )
    config = ObjectiveConfig.model_validate({"alpha": 1.0, "emphasis": {"by": by, "top": 0.4}})
    teacher = _teacher(kinds)
    objective = DistillationObjective(config, kind=kinds[0], teacher=teacher)
    labels_BS = torch.cat([torch.arange(N) % V, torch.tensor([-100])])[None]
    logits_BSV = torch.randn(1, N + 1, V, generator=_generator(4)).requires_grad_()
    terms = objective(StudentOutput.of_logits(logits_BSV), labels_BS, batch)
    p_NV = teacher.softened(batch, 1.0, **PLACE).dense().exp()
    log_q_NV = logits_BSV[0, :N].log_softmax(-1)
    entropies = {"student": torch.special.entr(log_q_NV.exp()).sum(-1), "teacher": torch.special.entr(p_NV).sum(-1)}
    score_N = entropies["student"] - entropies["teacher"] if by == "entropy-gap" else entropies[by.partition("-")[0]]
    weight_N = position_weights(score_N, torch.zeros(N, dtype=torch.long), strength=1.0, top=0.4).weight_N
    kl_N = (p_NV * (p_NV.log() - log_q_NV)).sum(-1)
    torch.testing.assert_close(terms.total, (weight_N * kl_N).sum(), rtol=1e-4, atol=1e-4)
    kept_N = weight_N > 0
    assert terms.counts["weight_teacher_1"] == int(kept_N.sum()) < N
    expected = 0.5 * int(kept_N[::2].sum())
    assert float(terms.named["weight_teacher_1"]) == pytest.approx(expected, rel=1e-5)
    (gradient,) = torch.autograd.grad(terms.total, logits_BSV)
    (wanted,) = torch.autograd.grad((weight_N.detach() * kl_N).sum(), logits_BSV)
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-5)


def test_confidence_reads_the_cached_probabilities_of_the_tokens() -> None:
    kinds = [TopK(8, (1.0,), "float32", V), TopK(5, (1.0,), "float32", V)]
    logits = [torch.randn(N, V, generator=_generator(seed)) for seed in (0, 1)]
    batch = _batch(kinds, logits, [None, torch.arange(N)])
    teacher = _teacher(kinds, weights="confidence")
    assert "actual_log_prob" in teacher.columns and "actual_log_prob" in teacher.other_columns[0]
    tail: Any = teacher.softened(batch, 1.0, **PLACE).tail
    p_NK = torch.stack([each.softmax(-1)[torch.arange(N), torch.arange(N) % V] for each in logits], dim=1)
    torch.testing.assert_close(tail.weight_NK, p_NK / p_NK.sum(-1, keepdim=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kinds", "settings", "message"),
    [
        ([TopK(4, (1.0,), "float32", V)] * 2, {"tail": "ghost"}, "use auto, sketch or uniform"),
        ([TopK(4, (1.0,), "float32", V)] * 2, {"tail": "sketch"}, "use ghost, uniform, renormalise or auto"),
        (
            [TopK(4, (1.0,), "float32", V), RandomSampling(8, 1.0, V)],
            {"fusion": "geometric"},
            "cache 1 gives no mass .* teachers.fusion: arithmetic",
        ),
        (
            [TopK(4, (1.0,), "float32", V)] * 2,
            {"fusion": "geometric", "tail": "renormalise"},
            "arithmetic, or objective.tail: auto",
        ),
    ],
)
def test_what_cannot_be_fused_is_refused(kinds: list[Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises((CacheError, RecipeError), match=message):
        _teacher(kinds, **settings)


def test_every_teacher_must_hold_the_temperature() -> None:
    teacher = _teacher([Full("float32", V), TopK(4, (1.0,), "float32", V)])
    teacher.check_temperatures([1.0])
    with pytest.raises(CacheError):
        teacher.check_temperatures([1.0, 2.0])
