"""Terms between layers against the same math written out, and which layer learns from which."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity, smooth_l1_loss

from teachercache.config.layer_losses import LAYER_LOSSES
from teachercache.errors import CacheError
from teachercache.models.activations import Heads
from teachercache.objective.layers.attention import AttentionTerm
from teachercache.objective.layers.heads import HeadMixture, head_mixture, mixed
from teachercache.objective.layers.hidden import HiddenTerm
from teachercache.objective.layers.pairs import layer_pairs
from teachercache.objective.layers.relations import RelationTerm
from teachercache.objective.layers.structure import StructureTerm
from teachercache.objective.layers.term import LayerBatch
from teachercache.targets.layers.attention import HeadShape, sees
from teachercache.targets.layers.attention_factors import StoredHeads

B, S, STUDENT, TEACHER, E = 2, 9, 12, 16, 4
# The second row holds two segments and ends in padding.
SEGMENT_BS = torch.tensor([[0] * 9, [0, 0, 0, 1, 1, 1, 1, -1, -1]])
FIRST_BS = torch.tensor([[1, *[0] * 8], [1, 0, 0, 1, 0, 0, 0, 0, 0]], dtype=torch.bool)
MASK_BS = torch.tensor([[1, 0, 1, 1, 1, 1, 1, 1, 0], [1, 1, 0, 1, 1, 1, 0, 0, 0]], dtype=torch.bool)
N = int(MASK_BS.sum())


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def batch(*, student_heads: int = 2, teacher_heads: int = 4, window: int | None = None) -> LayerBatch:
    hidden = numbers(B, S, STUDENT, seed=0).requires_grad_()
    heads = Heads(
        numbers(B, student_heads, S, E, seed=1).requires_grad_(), numbers(B, 1, S, E, seed=2).requires_grad_(),
        numbers(B, 1, S, E, seed=3).requires_grad_(), scaling=0.5,
    )  # fmt: skip
    taught = StoredHeads(
        numbers(B, teacher_heads, S, 8, seed=4), numbers(B, 2, S, 8, seed=5), numbers(B, 2, S, 8, seed=6),
        HeadShape(teacher_heads, 2, 8, 0.35, window), None,
    )  # fmt: skip
    return LayerBatch(
        MASK_BS, SEGMENT_BS, FIRST_BS, {1: hidden}, {1: heads}, {2: numbers(B, S, TEACHER, seed=7)}, {2: taught}
    )


def dense_map(
    queries_BHSE: Any, keys_BKSE: Any, scaling: float, window: int | None = None, first_key: bool = True
) -> torch.Tensor:
    """[B, H, S, S], token by token."""
    result = torch.zeros(*queries_BHSE.shape[:3], S)
    groups = queries_BHSE.shape[1] // keys_BKSE.shape[1]
    for b in range(B):
        for h in range(queries_BHSE.shape[1]):
            for i in range(S):
                keys = [
                    j
                    for j in range(i + 1)
                    if SEGMENT_BS[b, j] == SEGMENT_BS[b, i] >= 0
                    and (window is None or i - j < window)
                    and (first_key or (j > 0 and SEGMENT_BS[b, j] == SEGMENT_BS[b, j - 1]))
                ]
                if keys:
                    scores = keys_BKSE[b, h // groups, keys] @ queries_BHSE[b, h, i] * scaling
                    result[b, h, i, keys] = scores.softmax(-1)
    return result


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    gap = torch.where(teacher > 0, teacher * (teacher.clamp_min(1e-30).log() - student.clamp_min(1e-30).log()), 0.0)
    return (gap.sum(-1).mean(1) * MASK_BS).sum()


def test_a_loss_names_the_class_that_computes_it() -> None:
    classes = {loss.name: loss.term_class() for loss in LAYER_LOSSES.own}
    assert set(classes.values()) == {HiddenTerm, AttentionTerm, RelationTerm, StructureTerm}
    assert classes["hidden-mse"] is HiddenTerm and classes["key-relations"] is RelationTerm


def test_cosine_and_mean_squared_error_of_adapted_states() -> None:
    torch.manual_seed(0)
    made = batch()
    sizes: dict[str, Any] = {"student_width": STUDENT, "teacher_width": TEACHER, "variance": {2: 4.0}}
    term = HiddenTerm("hidden-cosine", ((1, 2),), **sizes)
    adapted = term.adapters[0](made.hidden[1][MASK_BS])
    cosine = cosine_similarity(adapted, made.teacher_hidden[2][MASK_BS], dim=-1)
    torch.testing.assert_close(term.loss(made), (1 - cosine).sum())
    torch.testing.assert_close(made.similarity[1], cosine.sum().detach())
    other = HiddenTerm("hidden-mse", ((1, 2),), **sizes)
    other.load_state_dict(term.state_dict())
    expected = (adapted - made.teacher_hidden[2][MASK_BS] / 2).square().mean(-1).sum()
    torch.testing.assert_close(other.loss(made), expected)


@pytest.mark.parametrize("match", ["hidden-cosine", "hidden-mse"])
def test_a_shared_adapter_is_one_whose_gradient_adds_up_over_pairs(match: str) -> None:
    one = batch()
    layers = {layer: numbers(B, S, STUDENT, seed=layer).requires_grad_() for layer in (1, 3)}
    taught = {2: numbers(B, S, TEACHER, seed=7), 4: numbers(B, S, TEACHER, seed=8)}
    made = LayerBatch(MASK_BS, SEGMENT_BS, FIRST_BS, layers, one.attention, taught, one.teacher_attention)
    sizes: dict[str, Any] = {"student_width": STUDENT, "teacher_width": TEACHER, "variance": {2: 4.0, 4: 1.0}}
    torch.manual_seed(0)
    pairs = ((1, 2), (3, 4))
    shared = HiddenTerm(match, pairs, **sizes, shared=True)
    apart = HiddenTerm(match, pairs, **sizes)
    weights = sum(each.numel() for each in shared.parameters())
    assert 2 * weights == sum(each.numel() for each in apart.parameters())
    for adapter in apart.adapters:
        adapter.load_state_dict(shared.adapters[0].state_dict())
    found, expected = shared.loss(made), apart.loss(made)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected, [*layers.values(), *apart.parameters()])
    got = torch.autograd.grad(found, [*layers.values(), *shared.parameters()])
    first, second = wanted[2 : 2 + len(got) - 2], wanted[len(got) :]
    for mine, twin in zip(got, [*wanted[:2], *(a + b for a, b in zip(first, second, strict=True))], strict=True):
        torch.testing.assert_close(mine, twin)


def test_a_shared_adapter_begins_less_the_mean_of_the_layers_means() -> None:
    means = {2: torch.ones(STUDENT), 4: 3 * torch.ones(STUDENT)}
    sizes: dict[str, Any] = {"student_width": STUDENT, "teacher_width": STUDENT, "variance": {2: 1.0, 4: 1.0}}
    term = HiddenTerm("hidden-mse", ((1, 2), (3, 4)), **sizes, means=means, shared=True)
    assert torch.equal(term.adapters[0].linear.bias.detach(), torch.full((STUDENT,), -2.0))


@pytest.mark.parametrize("first_key", [True, False])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("chunk_bytes", [None, 1, 2000])  # all, one and a few queries at a time
def test_attention_is_compared_map_by_map(
    first_key: bool, window: int | None, chunk_bytes: int | None, monkeypatch: Any
) -> None:
    if chunk_bytes:
        monkeypatch.setattr("teachercache.objective.layers.map_loss.CPU_CHUNK_BYTES", chunk_bytes)
        monkeypatch.setattr("teachercache.objective.layers.map_loss.FEWEST", 1)
    made = batch(window=window)
    ours, theirs = made.attention[1], made.teacher_attention[2]
    student = dense_map(ours.queries_BHSE, ours.keys_BKSE, 0.5, window, first_key)
    taught = dense_map(theirs.queries_BHSE, theirs.keys_BKSE, 0.35, window, first_key)
    grouped = taught.unflatten(1, (2, 2)).mean(2)
    for match, expected in (
        ("attention-kl", divergence(grouped, student)),
        ("attention-mse", ((grouped - student).square().sum(-1).mean(1) * MASK_BS).sum()),
    ):
        term = AttentionTerm(match, ((1, 2),), heads="average", student_heads=2, teacher_heads=4, first_key=first_key)
        found = term.loss(made)
        torch.testing.assert_close(found, expected)
        leaves = (ours.queries_BHSE, ours.keys_BKSE)
        for got, wanted in zip(
            torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("match", ["attention-kl", "attention-mse"])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_learned_mixtures_and_soft_caps_have_the_gradients_of_plain_autograd(
    match: str, softcap: float | None, monkeypatch: Any
) -> None:
    monkeypatch.setattr("teachercache.objective.layers.map_loss.CPU_CHUNK_BYTES", 1)
    monkeypatch.setattr("teachercache.objective.layers.map_loss.FEWEST", 2)  # queries at a time
    made = batch()
    heads = replace(made.attention[1], softcap=softcap)
    made = replace(made, attention={1: heads})
    term = AttentionTerm(match, ((1, 2),), heads="mix", student_heads=2, teacher_heads=4)
    theirs = made.teacher_attention[2]
    mixing = term.mixtures[0].logits_hH.softmax(-1)
    taught = torch.einsum("hH,BHCS->BhCS", mixing, dense_map(theirs.queries_BHSE, theirs.keys_BKSE, 0.35))
    sees_BSS = sees(torch, SEGMENT_BS, window=None)[:, None]
    keys = heads.keys_BKSE.repeat_interleave(2, dim=1)
    scores = heads.queries_BHSE @ keys.transpose(-1, -2) * 0.5
    scores = scores if softcap is None else (scores / softcap).tanh() * softcap
    student = scores.masked_fill(~sees_BSS, -1e9).softmax(-1) * sees_BSS
    expected = divergence(taught, student)
    if match == "attention-mse":
        expected = ((taught - student).square().sum(-1).mean(1) * MASK_BS).sum()
    found = term.loss(made)
    torch.testing.assert_close(found, expected)
    leaves = (heads.queries_BHSE, heads.keys_BKSE, term.mixtures[0].logits_hH)
    for got, wanted in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_small_gradients_survive_half_precision_through_the_scale_of_the_loss() -> None:
    made, scale = batch(), 2.0**20
    term = AttentionTerm("attention-kl", ((1, 2),), heads="average", student_heads=2, teacher_heads=4)
    heads = replace(made.attention[1], scaling=1 / scale)
    gradients = []
    for kind in (torch.float16, torch.float32):
        leaves = [each.detach().half().to(kind).requires_grad_() for each in (heads.queries_BHSE, heads.keys_BKSE)]
        theirs = {1: replace(heads, queries_BHSE=leaves[0], keys_BKSE=leaves[1])}
        gradients.append(torch.autograd.grad(term.loss(replace(made, attention=theirs)) * scale, leaves))
    for found, expected in zip(*gradients, strict=True):
        assert found.dtype == torch.float16 and float(expected.abs().max()) > 0.1
        torch.testing.assert_close(found.float(), expected, atol=1e-3, rtol=1e-3)


def test_the_teachers_own_attention_has_no_divergence_from_itself() -> None:
    theirs = batch().teacher_attention[2]
    same = Heads(theirs.queries_BHSE, theirs.keys_BKSE, theirs.values_BKSE, scaling=0.35)
    made = LayerBatch(MASK_BS, SEGMENT_BS, FIRST_BS, {}, {1: same}, {}, {2: theirs})
    for match in ("attention-kl", "attention-mse"):
        term = AttentionTerm(match, ((1, 2),), heads="average", student_heads=4, teacher_heads=4)
        assert abs(float(term.loss(made))) < 1e-5


def test_relations_among_vectors_do_not_ask_for_equal_heads() -> None:
    made = batch()
    ours, theirs = made.attention[1], made.teacher_attention[2]

    def relation(vectors: torch.Tensor, heads: int) -> torch.Tensor:
        cut = vectors.transpose(1, 2).flatten(2).unflatten(-1, (heads, -1)).transpose(1, 2)
        return dense_map(cut, cut, cut.shape[-1] ** -0.5)

    for match, student, teacher in (
        ("query-relations", ours.queries_BHSE, theirs.queries_BHSE),
        ("key-relations", ours.keys_BKSE, theirs.keys_BKSE),
        ("value-relations", ours.values_BKSE, theirs.values_BKSE),
    ):
        found = RelationTerm(match, ((1, 2),), relation_heads=2).loss(made)
        expected = divergence(relation(teacher, 2), relation(student, 2))
        torch.testing.assert_close(found, expected)
        [got], [wanted] = torch.autograd.grad(found, [student]), torch.autograd.grad(expected, [student])
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_distances_and_angles_are_those_of_positions() -> None:
    made = batch()
    student, teacher = made.hidden[1][MASK_BS], made.teacher_hidden[2][MASK_BS]
    sizes = {"student_width": STUDENT, "teacher_width": TEACHER}

    def distances(states: torch.Tensor) -> torch.Tensor:
        apart = torch.cdist(states, states)[~torch.eye(len(states), dtype=torch.bool)]
        return apart / apart.mean()

    def angles(states: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            [
                torch.stack(
                    [torch.stack([cosine_similarity(k - i, j - i, dim=0, eps=1e-6) for j in states]) for k in states]
                )
                for i in states
            ]
        )

    found = StructureTerm("distances", ((1, 2),), **sizes).loss(made)
    torch.testing.assert_close(found, smooth_l1_loss(distances(student), distances(teacher)) * N, rtol=1e-3, atol=1e-4)
    found = StructureTerm("angles", ((1, 2),), **sizes).loss(made)
    torch.testing.assert_close(found, smooth_l1_loss(angles(student), angles(teacher)) * N, rtol=1e-3, atol=1e-4)


def test_channel_correlations_are_those_of_numpy() -> None:
    torch.manual_seed(0)
    made = batch()
    term = StructureTerm("channel-correlation", ((1, 2),), student_width=STUDENT, teacher_width=TEACHER)
    adapted = term.adapters[0](made.hidden[1][MASK_BS])
    expected = (torch.corrcoef(adapted.T) - torch.corrcoef(made.teacher_hidden[2][MASK_BS].T)).square().mean() * N
    torch.testing.assert_close(term.loss(made), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("match", ["distances", "angles", "sample-distances", "channel-correlation"])
def test_a_batch_with_too_few_positions_gives_zero_with_a_gradient(match: str) -> None:
    made = batch()
    nothing = torch.zeros_like(MASK_BS)
    nothing[0, 0] = True
    small = LayerBatch(nothing, SEGMENT_BS, FIRST_BS, made.hidden, {}, made.teacher_hidden, {})
    loss = StructureTerm(match, ((1, 2),), student_width=STUDENT, teacher_width=TEACHER).loss(small)
    loss.backward()
    assert float(loss.detach()) == 0.0 and not made.hidden[1].grad.any()  # type: ignore[union-attr]


def test_no_positions_give_zero_that_reaches_every_weight() -> None:
    made = batch()
    empty = LayerBatch(
        torch.zeros_like(MASK_BS), torch.full_like(SEGMENT_BS, -1), FIRST_BS, made.hidden, made.attention,
        made.teacher_hidden, made.teacher_attention,
    )  # fmt: skip
    sizes: dict[str, Any] = {"student_width": STUDENT, "teacher_width": TEACHER}
    terms: list[Any] = [
        HiddenTerm("hidden-mse", ((1, 2),), **sizes, variance={2: 1.0}),
        AttentionTerm("attention-kl", ((1, 2),), heads="mix", student_heads=2, teacher_heads=4),
    ]
    for term in terms:
        loss = term.loss(empty)
        loss.backward()
        assert float(loss) == 0.0
        assert all(weights.grad is not None and not weights.grad.any() for weights in term.parameters())


@pytest.mark.parametrize(
    ("how", "teacher", "student", "expected"),
    [
        ("average", 4, 2, [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]),
        ("average", 2, 4, [[1, 0], [1, 0], [0, 1], [0, 1]]),
        ("interpolate", 3, 2, [[1, 0, 0], [0, 0, 1]]),
        ("interpolate", 3, 5, [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1]]),
    ],
)
def test_heads_are_mixed(how: str, teacher: int, student: int, expected: Any) -> None:
    torch.testing.assert_close(head_mixture(how, teacher=teacher, student=student), torch.tensor(expected).float())


def test_interpolating_12_heads_to_8_is_what_torch_does() -> None:
    maps = numbers(1, 12, 1, 5, seed=0).softmax(-1)
    found = mixed(HeadMixture("interpolate", teacher=12, student=8)(maps), maps)
    flat = maps.permute(0, 2, 3, 1).reshape(5, 1, 12)
    expected = torch.nn.functional.interpolate(flat, size=8, mode="linear", align_corners=True)
    torch.testing.assert_close(found, expected.reshape(1, 1, 5, 8).permute(0, 3, 1, 2))
    torch.testing.assert_close(found.sum(-1), torch.ones(1, 8, 1))


def test_a_learned_mixture_begins_near_interpolation() -> None:
    weights = HeadMixture("mix", teacher=12, student=8).logits_hH.softmax(-1)
    torch.testing.assert_close(weights, head_mixture("interpolate", teacher=12, student=8), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("rule", "stored", "expected"),
    [
        ("uniform", (4, 8, 12), ((2, 4), (4, 8), (6, 12))),
        ("uniform", (0, 12), ((0, 0), (6, 12))),
        ("uniform", (3, 4, 11, 12), ((2, 4), (6, 12))),
        ("first", (1, 5), ((1, 1), (5, 5))),
        ("last", (12, 9), ((6, 12), (3, 9))),
        ({3: 8, 1: 4}, (4, 8), ((1, 4), (3, 8))),
    ],
)
def test_layers_are_paired_by_rule(rule: Any, stored: tuple[int, ...], expected: Any) -> None:
    assert set(layer_pairs(rule, stored, what="hidden", student_blocks=6, teacher_blocks=12)) == set(expected)


@pytest.mark.parametrize(
    ("rule", "stored", "message"),
    [
        ("uniform", (), "the cache stores none"),
        ("first", (7,), "layer 7 of the teacher with the student's 7, but the student has 6 blocks"),
        ("last", (3,), "with the student's -3, but the student has 6 blocks"),
        ({2: 5}, (4, 8), r"layer 5 of the teacher, which is not stored \(stored are 4, 8\)"),
        ({9: 8}, (4, 8), "with the student's 9, but the student has 6 blocks"),
    ],
)
def test_pairs_that_do_not_fit_are_refused_in_a_line(rule: Any, stored: tuple[int, ...], message: str) -> None:
    with pytest.raises(CacheError, match=message):
        layer_pairs(rule, stored, what="hidden", student_blocks=6, teacher_blocks=12)


def test_head_counts_that_do_not_divide_are_refused_with_what_works() -> None:
    with pytest.raises(CacheError, match=r"12 heads .* cannot be grouped for 8 .* interpolate or heads: mix"):
        head_mixture("average", teacher=12, student=8)


def test_uniform_attention_pairs_begin_at_block_1() -> None:
    pairs = layer_pairs("uniform", (1, 15, 30), what="attention", student_blocks=8, teacher_blocks=30)
    assert pairs == ((1, 1), (4, 15), (8, 30))


@pytest.mark.parametrize("match", ["attention-kl", "query-relations"])
def test_what_the_student_rules_out_has_a_gradient_still(match: str) -> None:
    """The teacher looks at key 0, the student at key 1, by a hundred nats."""
    keys = torch.tensor([[10.0, 0.0], [0.0, 10.0], [0.0, 0.0]])[None, None]
    queries = torch.tensor([[0.0, 0.0], [0.0, 0.0], [-10.0, 10.0]])[None, None].requires_grad_()
    taught = torch.tensor([[0.0, 0.0], [0.0, 0.0], [10.0, -10.0]])[None, None]
    ours, theirs = Heads(queries, keys, keys, 1.0), StoredHeads(taught, keys, keys, HeadShape(1, 1, 2, 1.0), None)
    mask, segment = torch.tensor([[False, False, True]]), torch.zeros(1, 3, dtype=torch.int64)
    made = LayerBatch(mask, segment, segment < 0, {}, {1: ours}, {}, {1: theirs})
    if match == "attention-kl":
        loss = AttentionTerm(match, ((1, 1),), heads="average", student_heads=1, teacher_heads=1).loss(made)
        assert float(loss.detach()) > 90
    else:
        loss = RelationTerm(match, ((1, 1),), relation_heads=1).loss(made)
    assert bool(torch.autograd.grad(loss, queries)[0].isfinite().all())
    if match == "attention-kl":
        assert float(torch.autograd.grad(AttentionTerm(
            match, ((1, 1),), heads="average", student_heads=1, teacher_heads=1
        ).loss(made), queries)[0].abs().max()) > 1  # fmt: skip


def test_weights_of_heads_stay_whole_in_half_precision() -> None:
    mixture = HeadMixture("interpolate", teacher=12, student=8).bfloat16()
    torch.testing.assert_close(mixture(torch.zeros(1)).sum(-1), torch.ones(8))


def test_idling_runs_the_same_modules_in_the_same_order_as_the_loss() -> None:
    made = batch()
    sizes: dict[str, Any] = {"student_width": STUDENT, "teacher_width": TEACHER}
    terms: list[Any] = [
        HiddenTerm("hidden-cosine", ((1, 2),), **sizes, variance={2: 1.0}),
        HiddenTerm("hidden-mse", ((1, 2), (1, 2)), **sizes, variance={2: 1.0}, shared=True),
        AttentionTerm("attention-kl", ((1, 2),), heads="mix", student_heads=2, teacher_heads=4),
        StructureTerm("channel-correlation", ((1, 2),), **sizes),
    ]
    called: list[Any] = []
    for term in terms:
        for module in term.modules():
            if module is not term and not isinstance(module, torch.nn.ModuleList):
                module.register_forward_hook(lambda module, *_: called.append(module))
    for term in terms:
        term.loss(made)
    expected, called[:] = list(called), []
    zero = torch.stack([term.zero_contribution(torch.zeros(())) for term in terms]).sum()
    assert called == expected and float(zero.detach()) == 0.0
    zero.backward()
    for term in terms:
        assert all(weights.grad is not None and not weights.grad.any() for weights in term.parameters())
