"""Layers as a teacher captures them: hidden states within their step, and attention that is rebuilt as the teacher's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from teacher.layered import LOGITS, ROWS, V, alone, divergence, prepared
from teacher.rows import make_row
from teachercache.errors import ModelError
from teachercache.targets import HiddenStates, StoredTargets
from teachercache.targets.layers.attention import log_attention, sees
from teachercache.targets.layers.attention_relations import Relations
from teachercache.targets.layers.attention_vectors import QueriesKeys
from teachercache.teacher import Teacher
from teachercache.tokens.rows import TokenRow

from tiny_models import BLOCKS, CONTEXT, HEADS, KEY_HEADS, WIDTH, model_of

SHARED: dict[str, Any] = {
    "heads": HEADS, "key_heads": KEY_HEADS, "head_width": WIDTH // HEADS, "width": WIDTH, "blocks": BLOCKS,
}  # fmt: skip


def hidden(*layers: int, codec: str = "int8", step: float = 0.05) -> HiddenStates:
    return HiddenStates(layers=layers, width=WIDTH, blocks=BLOCKS, codec=codec, step=step, calibration_positions=10_000)


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
    packed = make_row(50, seed=5, starts=(0, 20, 33), vocabulary=V)
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
    teacher = Teacher.of(
        model_of("llama"), targets=StoredTargets(LOGITS, hidden=hidden(1)), layout="documents", pad_id=0
    )
    with pytest.raises(ModelError, match=r"no token is left to fit the steps of hidden 1 to"):
        teacher.prepare([], positions_per_batch=64, longest=CONTEXT)
