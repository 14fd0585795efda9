"""Checkpoints that lack weights are refused, whoever loads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from teachercache.errors import ModelError
from teachercache.models.loading import load_causal_lm

from builders import build_cache, tiny_model, tiny_recipe, tiny_teacher, tiny_tokenizer


def without(folder: Path, part: str) -> Path:
    """A folder's model without the weights whose names have `part`."""
    file = folder / "model.safetensors"
    kept = {name: weights for name, weights in load_file(file).items() if part not in name}
    save_file(kept, file, metadata={"format": "pt"})
    return folder


def test_a_classifier_is_no_teacher(tmp_path: Path) -> None:
    """Its body is a language model's, and its output layer another thing."""
    config = tiny_model(tied=False).config
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    tiny_tokenizer().save_pretrained(tmp_path / "classifier")
    with pytest.raises(ModelError, match=r"classifier lacks lm_head.weight of LlamaForCausalLM.*complete") as refusal:
        build_cache(tiny_recipe(tmp_path / "c", teacher=tmp_path / "classifier"))
    assert "\n" not in str(refusal.value)


def test_a_block_without_weights_is_refused(tmp_path: Path) -> None:
    folder = without(tiny_teacher(tmp_path / "teacher", layers=3), "layers.1.")
    with pytest.raises(ModelError, match=r"lacks model.layers.1.input_layernorm.weight, .* and 6 more weights"):
        load_causal_lm(str(folder))


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = tiny_teacher(tmp_path / "teacher")
    tiny_teacher(tmp_path / "wider", hidden=64)
    (folder / "config.json").write_bytes((tmp_path / "wider" / "config.json").read_bytes())
    with pytest.raises(ModelError, match=r"in shape \(\d+, 32\) where \(\d+, 64\) is needed.*more weights") as refusal:
        load_causal_lm(str(folder))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_output_layer_is_not_missed(tmp_path: Path, tied: bool) -> None:
    folder = tiny_teacher(tmp_path / "teacher", tied=tied)
    one, other = (load_causal_lm(str(folder)).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
