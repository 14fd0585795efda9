"""Layers as a teacher captures them: hidden states within their step, and attention that is rebuilt as the teacher's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from models import BLOCKS, CONTEXT, HEADS, KEY_HEADS, WIDTH, model_of
from teachercache.errors import ModelError
from teachercache.targets import HiddenStates, StoredTargets, TopK
from teachercache.targets.attention import log_attention, sees
from teachercache.targets.attention_relations import QueriesKeys, Relations
from teachercache.teacher import Teacher
from teachercache.tokens.rows import Segment, TokenRow

V = 300
LOGITS = TopK(4, (1.0,), "float32", V)
SHARED: dict[str, Any] = {
    "heads": HEADS, "key_heads": KEY_HEADS, "head_width": WIDTH // HEADS, "width": WIDTH, "blocks": BLOCKS,
}  # fmt: skip


def row(length: int, *, seed: int, starts: tuple[int, ...] = (0,)) -> TokenRow:
    generator = np.random.default_rng(seed)
    mask_S = np.ones(length, dtype=bool)
    mask_S[[*(start - 1 for start in starts[1:]), length - 1]] = False
    segments = tuple(Segment(f"{seed:032x}", 0, 0, 1, start) for start in starts)
    return TokenRow(f"{seed:032x}", False, generator.integers(0, V, length).astype(np.int32), mask_S, segments)


ROWS = [row(30, seed=0), row(12, seed=1), row(45, seed=2), row(2, seed=3)]
SAMPLE = [row(60, seed=100 + seed) for seed in range(12)]


def hidden(*layers: int, codec: str = "int8", step: float = 0.05) -> HiddenStates:
    return HiddenStates(layers=layers, width=WIDTH, blocks=BLOCKS, codec=codec, step=step, calibration_positions=10_000)


def prepared(model: Any, *, layout: str = "documents", **kinds: Any) -> Teacher:
    teacher = Teacher(model, targets=StoredTargets(LOGITS, **kinds), layout=layout, pad_id=0)
    teacher.prepare(SAMPLE, positions_per_batch=256, longest=64)
    return teacher


def alone(model: Any, one: TokenRow, *, start: int = 0, stop: int | None = None) -> Any:
    """A row, or a segment of it, by itself, with everything that transformers returns."""
    ids_BS = torch.from_numpy(one.input_ids_S[start:stop].astype(np.int64))[None]
    with torch.no_grad():
        return model(ids_BS, use_cache=False, output_hidden_states=True, output_attentions=True)


def maps_of(targets: StoredTargets, captured: Any, one: TokenRow, layer: int) -> torch.Tensor:
    """[H, S, S] as training rebuilds it."""
    arrays = {
        name: torch.from_numpy(np.ascontiguousarray(values))[None]
        for name, values in targets.decoded(captured.columns).items()
    }
    positions = torch.from_numpy(one.position_ids_S())[None]
    heads = targets.attention.stored_heads(torch, layer, arrays, positions)
    seen = sees(torch, torch.from_numpy(one.segment_S())[None], window=heads.shape.window)
    return log_attention(
        heads.queries_BHSE, heads.keys_BKSE, seen, scaling=heads.shape.scaling, softcap=heads.shape.softcap,
        sinks_H=heads.sinks_H,
    )[0].exp()  # fmt: skip


def divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    """KL in nats, mean over queries and heads."""
    gap = torch.where(expected > 0, expected * (expected.clamp_min(1e-38).log() - found.clamp_min(1e-38).log()), 0.0)
    return float(gap.sum(-1).mean())


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_hidden_states_are_those_of_each_row_alone(architecture: str) -> None:
    model = model_of(architecture)
    teacher = prepared(model, hidden=hidden(0, 2))
    captured = teacher.capture(ROWS, positions_per_batch=64)
    arrays = teacher.targets.hidden.layer_file.arrays  # type: ignore[union-attr]
    for one, item in zip(ROWS, captured, strict=True):
        found, expected = teacher.targets.decoded(item.columns or {}), alone(model, one).hidden_states
        assert item.columns is not None and {"head_ids", "hidden_0", "hidden_2"} <= set(item.columns)
        for layer in (0, 2):
            off_SD = np.abs(found[f"hidden_{layer}"] - expected[layer][0].numpy())
            assert (off_SD <= 0.5001 * 0.05 * arrays[f"hidden.{layer}.spread"] + 1e-4).all()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma2", "gpt_oss"])
def test_relations_rebuild_the_teachers_own_attention(architecture: str) -> None:
    eager = model_of(architecture, attention="eager")
    teacher = prepared(eager, hidden=hidden(0, 1, 2), attention=Relations(layers=(1, 2, 3), **SHARED))
    captured = teacher.capture(ROWS, positions_per_batch=64)
    for one, item in zip(ROWS, captured, strict=True):
        for layer in (1, 2, 3):
            expected = alone(eager, one).attentions[layer - 1][0]
            assert divergence(expected, maps_of(teacher.targets, item, one, layer)) < 2e-2


def test_a_finer_step_rebuilds_attention_closer() -> None:
    eager = model_of("llama", attention="eager")
    found = []
    for step in (0.2, 0.05, 0.01):
        teacher = prepared(eager, hidden=hidden(1, step=step), attention=Relations(layers=(2,), **SHARED))
        [item] = teacher.capture(ROWS[2:3], positions_per_batch=64)
        found.append(divergence(alone(eager, ROWS[2]).attentions[1][0], maps_of(teacher.targets, item, ROWS[2], 2)))
    assert found[0] > 8 * found[1] > 64 * found[2]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "gpt_oss"])
def test_queries_and_keys_rebuild_attention_of_any_architecture(architecture: str) -> None:
    eager = model_of(architecture, attention="eager")
    shared = {**SHARED, "key_heads": HEADS} if architecture == "gpt2" else SHARED
    kind = QueriesKeys(layers=(1, 3), **shared, step=0.02, calibration_positions=10_000)
    teacher = prepared(eager, attention=kind)
    for one, item in zip(ROWS, teacher.capture(ROWS, positions_per_batch=64), strict=True):
        for layer in (1, 3):
            expected = alone(eager, one).attentions[layer - 1][0]
            assert divergence(expected, maps_of(teacher.targets, item, one, layer)) < 2e-2


def test_segments_of_a_packed_row_have_the_attention_that_they_have_alone() -> None:
    model, eager = model_of("llama"), model_of("llama", attention="eager")
    packed = row(50, seed=5, starts=(0, 20, 33))
    teacher = prepared(model, layout="packed", hidden=hidden(1, step=0.01), attention=Relations(layers=(2,), **SHARED))
    [item] = teacher.capture([packed], positions_per_batch=64)
    found = maps_of(teacher.targets, item, packed, 2)
    for start, stop in ((0, 20), (20, 33), (33, 50)):
        expected = alone(eager, packed, start=start, stop=stop).attentions[1][0]
        assert divergence(expected, found[:, start:stop, start:stop]) < 1e-2
        assert not found[:, start:stop, :start].any() and not found[:, start:stop, stop:].any()


def test_queries_that_are_made_in_another_way_are_refused_with_what_works() -> None:
    shared = {**SHARED, "key_heads": HEADS}
    with pytest.raises(ModelError, match=r"block 2 of GPT2LMHeadModel has no query and key matrices .* queries-keys"):
        prepared(model_of("gpt2"), hidden=hidden(1), attention=Relations(layers=(2,), **shared))
    model = model_of("llama")
    model.model.layers[1].input_layernorm.forward = lambda values: torch.tanh(values)
    with pytest.raises(ModelError, match=r"block 2 of LlamaForCausalLM cannot be rebuilt .* queries-keys"):
        prepared(model, hidden=hidden(1), attention=Relations(layers=(2,), **SHARED))


def test_rotary_tables_that_depend_on_the_length_of_a_row_are_refused_with_what_works() -> None:
    scaled = {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}}
    kinds: dict[str, Any] = {"hidden": hidden(1), "attention": Relations(layers=(2,), **SHARED)}
    prepared(model_of("llama", **scaled), **kinds)  # no row is longer than what the model was trained with
    with pytest.raises(ModelError, match=r"block 2 of LlamaForCausalLM rotates .* by a row's length.* queries-keys"):
        prepared(model_of("llama", **scaled, max_position_embeddings=16), **kinds)


def test_heads_other_than_the_configs_are_refused() -> None:
    kind = Relations(layers=(2,), **{**SHARED, "key_heads": HEADS})
    with pytest.raises(ModelError, match=r"block 2 has 4 heads \(2 of keys\) 8 wide, .* 4 \(4\) and 8"):
        prepared(model_of("llama"), hidden=hidden(1), attention=kind)


def test_a_row_whose_layers_are_not_finite_has_a_problem_and_the_others_their_columns() -> None:
    model = model_of("llama")
    teacher = prepared(model, hidden=hidden(1))
    sick = ROWS[1].input_ids_S[4]
    with torch.no_grad():
        model.get_input_embeddings().weight[int(sick)] = torch.nan
    healthy = [one for one in ROWS if int(sick) not in one.input_ids_S]
    results = teacher.capture([ROWS[1], *healthy], positions_per_batch=256)
    assert results[0].columns is None and "not finite" in str(results[0].problem)
    assert healthy and all(item.columns is not None for item in results[1:])


def test_a_sample_without_a_token_is_refused() -> None:
    teacher = Teacher(model_of("llama"), targets=StoredTargets(LOGITS, hidden=hidden(1)), layout="documents", pad_id=0)
    with pytest.raises(ModelError, match=r"no token is left to fit the steps of hidden 1 to"):
        teacher.prepare([], positions_per_batch=64, longest=CONTEXT)
