"""Weights of hard positions against the same math written out position by position, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from objective.seeded import Largest, leaves, random, teacher
from teachercache.config import EmphasisConfig
from teachercache.objective.token_weighting.entropy import entropy_of_logits, entropy_of_teacher, entropy_projected
from teachercache.objective.token_weighting.weights import emphasis_of, position_weights, segments_of
from teachercache.targets.logits.softened import SketchTail, Softened, UniformTail

V = 40


def naive_entropy(log_p_NV: Tensor) -> Tensor:
    p_NV = log_p_NV.double().exp()
    return -torch.where(p_NV > 0, p_NV * log_p_NV.double(), 0.0).sum(-1)


def naive_weights(scores: list[float], segments: list[int], strength: float, top: float | None) -> list[float]:
    """Row by row, in plain Python."""
    weights = [0.0] * len(scores)
    for segment in dict.fromkeys(segments):
        places = [place for place, each in enumerate(segments) if each == segment]
        best = sorted(places, key=lambda place: (-scores[place], place))
        kept = set(best[: max(1, math.ceil(len(places) * top - 1e-9))] if top else best)
        largest = max(scores[place] for place in places)
        parts = {p: ((scores[p] / largest) ** strength if largest else 1.0) if p in kept else 0.0 for p in places}
        for place in places:
            weights[place] = len(places) * parts[place] / sum(parts.values())
    return weights


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 1e-9, 0.1, 0.5, 2.0, 2.0, 7.5]), st.booleans()), min_size=1, max_size=30),
    st.sampled_from([0.0, 0.5, 1.0, 3.0, 200.0]),
    st.sampled_from([None, 0.01, 0.3, 0.5, 1.0]),
)
def test_weights_are_those_of_their_definition(rows: Any, strength: float, top: float | None) -> None:
    scores = [score for score, _ in rows]
    begins = [True, *(new for _, new in rows[1:])]
    segments = torch.tensor(begins).cumsum(0)
    found = position_weights(torch.tensor(scores, dtype=torch.float64), segments, strength=strength, top=top)
    expected = naive_weights(scores, segments.tolist(), strength, top)
    torch.testing.assert_close(found.weight_N, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    weights = found.weight_N
    for segment in segments.unique():
        assert float(weights[segments == segment].sum()) == pytest.approx(int((segments == segment).sum()))
    rows_of = [weights[segments == segment] for segment in segments.unique()]
    effective = sum(len(row) * float(row.sum() ** 2 / (row**2).sum() / len(row)) for row in rows_of)
    assert float(found.effective) == pytest.approx(effective)


def test_a_row_weighs_the_same_alone_and_among_others() -> None:
    scores, segments = random(0, 12).abs(), torch.tensor([1] * 5 + [2] * 4 + [3] * 3)
    together = position_weights(scores, segments, strength=1.5, top=0.6)
    alone = [position_weights(scores[segments == s], segments[segments == s], strength=1.5, top=0.6) for s in (1, 2, 3)]
    assert torch.equal(together.weight_N, torch.cat([each.weight_N for each in alone]))
    torch.testing.assert_close(together.effective, torch.stack([each.effective for each in alone]).sum())


def test_of_equal_scores_the_first_are_kept() -> None:
    found = position_weights(torch.ones(5), torch.ones(5, dtype=torch.int64), strength=1.0, top=0.4)
    assert found.weight_N.tolist() == [2.5, 2.5, 0.0, 0.0, 0.0]


def test_no_positions_have_no_weights() -> None:
    found = position_weights(torch.zeros(4), torch.ones(4, dtype=torch.int64), strength=1.0, top=0.5)
    assert found.weight_N.tolist() == [2.0, 2.0, 0.0, 0.0]  # also where no score says more than another
    found = position_weights(torch.zeros(0), torch.zeros(0, dtype=torch.int64), strength=1.0, top=0.5)
    assert found.weight_N.shape == (0,) and float(found.effective) == 0


def test_segments_begin_where_positions_do() -> None:
    labels = torch.zeros(2, 5, dtype=torch.int64)
    assert segments_of(labels, None).tolist() == [[1] * 5, [2] * 5]
    packed = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]])
    assert segments_of(labels, packed).tolist() == [[1, 1, 1, 2, 2], [3, 3, 4, 4, 4]]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_students_entropy_is_that_of_its_softmax(softcap: float | None, dtype: torch.dtype) -> None:
    """Over all columns: those that no token has are sampled like others."""
    hidden, weight, bias = leaves(dtype)
    logits = torch.nn.functional.linear(hidden.double(), weight.double(), bias.double())
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    expected = naive_entropy(logits.log_softmax(-1)).detach()
    chunked = entropy_projected(hidden, weight, bias, softcap=softcap, chunk_bytes=4 * len(weight) * 6)
    positions = torch.tensor([0, 1, 2, 5, 9])
    whole = entropy_of_logits(logits.to(dtype).detach(), positions_N=positions)
    exact = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(chunked.double(), expected, **exact)
    torch.testing.assert_close(whole.double(), expected[positions], **exact)
    assert not chunked.requires_grad and chunked.dtype == dtype


def test_autocast_decides_the_type_of_the_matmul() -> None:
    hidden, weight, _ = leaves(torch.float32, bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = entropy_projected(hidden, weight, None)
    expected = entropy_projected(hidden.bfloat16(), weight.bfloat16(), None)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_entropy_is_exact_where_the_student_is_almost_certain() -> None:
    logits = torch.zeros(1, V)
    logits[0, 3] = 15.0
    expected = naive_entropy(logits.double().log_softmax(-1))
    found = entropy_of_logits(logits, positions_N=torch.arange(1))
    torch.testing.assert_close(found.double(), expected, rtol=0.0, atol=3e-7)
    certain = torch.full((1, V), -math.inf)
    certain[0, 3] = 1.0
    assert float(entropy_of_logits(certain, positions_N=torch.arange(1))) == 0.0


@pytest.mark.parametrize("tail", ["uniform", "sketch"])
def test_the_teachers_entropy_is_that_of_all_its_tokens(tail: str) -> None:
    softened = teacher(tail)
    expected = naive_entropy(softened.dense())
    torch.testing.assert_close(entropy_of_teacher(softened, vocabulary_size=V), expected)


def test_a_bucket_is_one_outcome_and_padding_is_none() -> None:
    log_p = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]).log()
    ghost = Softened(torch.tensor([[3, 7], [4, 4]]), log_p[:, :2], log_p[:, 2])
    expected = torch.tensor([1.5 * math.log(2), 0.0])
    torch.testing.assert_close(entropy_of_teacher(ghost, vocabulary_size=V), expected)
    empty = ghost.with_tail(UniformTail(V, ghost.head_log_prob_Nk))
    with_shape = expected + torch.tensor([0.25 * math.log(V - 2), 0.0])
    torch.testing.assert_close(entropy_of_teacher(empty, vocabulary_size=V), with_shape)


@pytest.mark.parametrize("by", ["student-entropy", "teacher-entropy", "entropy-gap"])
def test_only_the_entropies_that_a_score_needs_are_computed(by: str) -> None:
    asked = []

    def entropy(whose: str, values: list[float]) -> Any:
        return lambda: asked.append(whose) or torch.tensor(values)

    found = emphasis_of(
        EmphasisConfig.model_validate({"by": by}),
        torch.ones(2, dtype=torch.int64),
        student_entropy=entropy("student", [3.0, 1.0]),
        teacher_entropy=entropy("teacher", [1.0, 3.0]),
    )
    assert asked == [name for name in ("student", "teacher") if name in by or by == "entropy-gap"]
    expected = {"student-entropy": [1.5, 0.5], "teacher-entropy": [0.5, 1.5], "entropy-gap": [2.0, 0.0]}
    torch.testing.assert_close(found.weight_N, torch.tensor(expected[by]))


def test_no_entropy_makes_anything_as_large_as_the_logits() -> None:
    positions, vocabulary = 600, 5000
    hidden, weight = torch.randn(positions, 4), torch.randn(vocabulary, 4)
    log_p = torch.randn(positions, 3).log_softmax(-1)
    ids = torch.randint(0, 50, (positions, 1))
    tail = SketchTail(torch.randn(positions, 2), torch.randn(vocabulary, 2), torch.randn(vocabulary))
    softened = Softened(ids, log_p[:, :1], log_p[:, 1:].logsumexp(-1), tail)
    with Largest() as largest:
        entropy_projected(hidden, weight, None, chunk_bytes=4 * vocabulary * 50)
        entropy_of_teacher(softened, vocabulary_size=vocabulary)
    assert largest.elements <= 128 * vocabulary
