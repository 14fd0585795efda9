"""Attention as stored maps: what transformers returns, within the bound, and what is left of it with fewer keys or heads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from teacher.layered import ROWS, V, alone, divergence, prepared
from teacher.rows import make_row
from teachercache.cache import StoredRow
from teachercache.errors import CacheDamaged, ModelError
from teachercache.models.activations import recorded
from teachercache.stream.cache_rows import OwnTensors
from teachercache.stream.collate import collate
from teachercache.targets import StoredTargets
from teachercache.targets.layers.attention import sees
from teachercache.targets.layers.attention_maps import AttentionMaps
from teachercache.targets.layers.layer_file import LayerFile
from teachercache.teacher import Teacher

from tiny_models import BLOCKS, HEADS, KEY_HEADS, WIDTH, model_of

BOUND = 1e-3  # nats


def maps(architecture: str = "llama", *, heads: int = HEADS, top: int | None = None) -> AttentionMaps:
    return AttentionMaps(
        layers=(1, 2, 3), heads=heads, teacher_heads=HEADS, key_heads=HEADS if architecture == "gpt2" else KEY_HEADS,
        head_width=WIDTH // HEADS, width=WIDTH, blocks=BLOCKS, top=top,
    )  # fmt: skip


def rebuilt(targets: StoredTargets, item: Any, layer: int) -> torch.Tensor:
    """[h, S, S] as training reads it."""
    columns = [column.name for column in targets.attention.columns]
    stored = StoredRow(item.row, item.columns)
    batch = collate([stored], layout="packed", pad_id=0, tensors=OwnTensors(targets, columns))["layers"]
    position_BS = torch.from_numpy(item.row.position_ids_S())[None]
    found = targets.attention.stored_heads(torch, layer, batch, position_BS)
    seen = sees(torch, batch["segment"], window=found.window)
    return found.probabilities(slice(None), seen)[0]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("chunk_bytes", [None, 1500])
def test_maps_are_the_teachers_own(architecture: str, chunk_bytes: int | None, monkeypatch: Any) -> None:
    if chunk_bytes:  # a few queries
        monkeypatch.setattr("teachercache.targets.layers.attention_maps.CHUNK_BYTES", chunk_bytes)
    eager = model_of(architecture, attention="eager")
    teacher = prepared(eager, attention=maps(architecture))
    for one, item in zip(ROWS, teacher.capture(ROWS, positions_per_batch=64), strict=True):
        assert item.columns is not None and item.columns["map_2"].shape == (one.pairs, HEADS)
        for layer in (1, 2, 3):
            expected, found = alone(eager, one).attentions[layer - 1][0], rebuilt(teacher.targets, item, layer)
            assert divergence(expected, found) <= BOUND
            torch.testing.assert_close(found.sum(-1), torch.ones(HEADS, one.length))
            assert (found[expected > 0] > 0).all() and not found[:, 0, 1:].any()


def test_a_row_is_coded_as_the_same_math_pair_by_pair() -> None:
    eager = model_of("llama", attention="eager")
    [item] = prepared(eager, attention=maps()).capture(ROWS[1:2], positions_per_batch=64)
    expected = alone(eager, ROWS[1]).attentions[1][0].double()
    place, before = 0, torch.zeros(HEADS, ROWS[1].length)
    for query in range(ROWS[1].length):
        for key in range(query + 1):
            code_H = (255 * expected[:, query, key] ** 0.25).round()
            stored_H = torch.from_numpy(item.columns["map_2"][place].astype(np.int64))  # type: ignore[index]
            assert ((stored_H - (code_H - before[:, key]) + 1) % 256 <= 2).all()  # the model's sums end in another bit
            before[:, key], place = code_H, place + 1


@pytest.mark.parametrize("heads", [1, 2])
def test_heads_are_averaged_in_groups(heads: int) -> None:
    eager = model_of("llama", attention="eager")
    teacher = prepared(eager, attention=maps(heads=heads))
    for one, item in zip(ROWS, teacher.capture(ROWS, positions_per_batch=64), strict=True):
        expected = alone(eager, one).attentions[1][0].unflatten(0, (heads, -1)).mean(1)
        assert divergence(expected, rebuilt(teacher.targets, item, 2)) <= BOUND


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("top", [3, 60])
def test_of_the_largest_keys_each_is_kept_and_all_others_are_alike(architecture: str, top: int) -> None:
    eager = model_of(architecture, attention="eager")
    teacher = prepared(eager, attention=maps(architecture, top=top))
    for one, item in zip(ROWS, teacher.capture(ROWS, positions_per_batch=64), strict=True):
        for layer in (1, 2):
            exact, found = alone(eager, one).attentions[layer - 1][0], rebuilt(teacher.targets, item, layer)
            expected = torch.zeros_like(exact)
            window = teacher.targets.attention.shapes[layer].window or one.length
            for head in range(HEADS):
                for query in range(one.length):
                    first = max(0, query + 1 - window)
                    seen = exact[head, query, first : query + 1]
                    largest = seen.topk(min(top, len(seen))).indices
                    others = torch.ones(len(seen), dtype=torch.bool)
                    others[largest] = False
                    shares = torch.where(others, seen[others].sum() / others.sum().clamp_min(1), seen)
                    expected[head, query, first : query + 1] = shares
            assert divergence(expected, found) <= BOUND
            assert not found[expected == 0].any()


def test_more_keys_are_nearer_to_the_map() -> None:
    eager = model_of("llama", attention="eager")
    found = []
    for top in (1, 4, 16, 64):
        teacher = prepared(eager, attention=maps(top=top))
        [item] = teacher.capture(ROWS[2:3], positions_per_batch=64)
        found.append(divergence(alone(eager, ROWS[2]).attentions[1][0], rebuilt(teacher.targets, item, 2)))
    assert found == sorted(found, reverse=True) and found[-1] <= BOUND


@pytest.mark.parametrize("top", [None, 60])
def test_segments_of_a_packed_row_have_the_maps_that_they_have_alone(top: int | None) -> None:
    model, eager = model_of("llama"), model_of("llama", attention="eager")
    packed = make_row(50, seed=5, starts=(0, 20, 33), vocabulary=V)
    teacher = prepared(model, layout="packed", attention=maps(top=top))
    [item] = teacher.capture([packed], positions_per_batch=64)
    assert packed.pairs == 20 * 21 // 2 + 13 * 14 // 2 + 17 * 18 // 2
    found = rebuilt(teacher.targets, item, 2)
    for start, stop in ((0, 20), (20, 33), (33, 50)):
        expected = alone(eager, packed, start=start, stop=stop).attentions[1][0]
        assert divergence(expected, found[:, start:stop, start:stop]) <= BOUND
        assert not found[:, start:stop, :start].any() and not found[:, start:stop, stop:].any()


@pytest.mark.parametrize("top", [None, 6])
def test_a_narrower_sight_leaves_a_distribution(top: int | None) -> None:
    model = model_of("llama")
    teacher = prepared(model, attention=maps(top=top))
    [item] = teacher.capture(ROWS[:1], positions_per_batch=64)
    columns = [column.name for column in teacher.targets.attention.columns]
    stored = StoredRow(item.row, item.columns)
    batch = collate([stored], layout="documents", pad_id=0, tensors=OwnTensors(teacher.targets, columns))["layers"]
    position_BS = torch.arange(ROWS[0].length)[None]
    found = teacher.targets.attention.stored_heads(torch, 2, batch, position_BS)
    near = sees(torch, batch["segment"], window=4)
    whole = found.probabilities(slice(None), sees(torch, batch["segment"], window=None)).masked_fill(~near, 0.0)
    part = slice(7, 19)
    narrow = found.probabilities(part, near[:, part])
    expected = (whole / whole.sum(-1, keepdim=True))[:, :, part]
    torch.testing.assert_close(narrow, expected)
    torch.testing.assert_close(found.probabilities(part, near[:, part, 4:19], first=4), expected[..., 4:19])


def test_a_key_before_its_row_is_refused() -> None:
    steps_Smh = np.zeros((5, 3, 2), dtype=np.uint16)
    steps_Smh[2, :, 1] = 1
    with pytest.raises(CacheDamaged, match="column map_keys_2: a key lies before the first token of its row"):
        maps(top=3).check_stored({"map_keys_2": steps_Smh})


@pytest.mark.parametrize("top", [None, 5])
def test_attention_that_is_not_finite_is_a_problem_of_its_row(top: int | None) -> None:
    model = model_of("llama")
    teacher = prepared(model, attention=maps(top=top))
    with recorded(model, attention=(1, 2, 3)) as activations, torch.no_grad():
        model.base_model(input_ids=torch.from_numpy(ROWS[1].input_ids_S.astype(np.int64))[None], use_cache=False)
    activations.attention[2].queries_BHSE[0, 1, 3] = torch.nan
    from teachercache.teacher.layers import rows_of

    [held] = rows_of(activations, ROWS[1:2], layout="documents")
    with pytest.raises(ValueError, match="attention of block 2 is not finite"):
        teacher.targets.attention.capture(torch, held)


def test_sinks_are_refused_with_what_holds_them() -> None:
    with pytest.raises(ModelError, match=r"block 1 of GptOssForCausalLM leaves mass to sinks.* queries-keys"):
        prepared(model_of("gpt_oss"), attention=maps())


def test_other_heads_than_the_configs_are_refused() -> None:
    with pytest.raises(ModelError, match=r"block 1 has 4 heads \(2 of keys\) 8 wide, .* 4 \(4\) and 8"):
        prepared(model_of("llama"), attention=maps("gpt2"))


def test_a_layer_file_needs_no_arrays(tmp_path: Any) -> None:
    teacher: Teacher = prepared(model_of("gemma2", attention="eager"), attention=maps("gemma2"))
    shapes = teacher.targets.attention.shapes
    assert {shape.window for shape in shapes.values()} == {8, None}
    described = {layer: {"shape": shape.to_metadata()} for layer, shape in shapes.items()}
    again = LayerFile.load(LayerFile({}, described).save(tmp_path))
    assert maps("gemma2").with_layers(again).shapes == shapes
