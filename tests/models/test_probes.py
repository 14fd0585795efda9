"""Probes of a loaded model on a few tokens, over architectures that differ in it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from teachercache.cache import Cache
from teachercache.errors import ModelError
from teachercache.evaluation.quality import held_out_rows, quality
from teachercache.models.probes import (
    check_causal,
    check_length,
    isolates_packed_segments,
    most_tokens,
    sees_later_tokens,
)
from teachercache.targets import StoredTargets, TopK
from teachercache.teacher import Teacher
from teachercache.training.initialise.init_student import init_student

from builders import build_cache, tiny_cache, tiny_model, tiny_recipe, tiny_tokenizer
from tiny_models import model_of

VOCABULARY = 160
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip


def made(config: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**{**SIZES, **settings})).eval()


BIDIRECTIONAL: dict[str, Any] = {
    "BertConfig": {}, "RobertaConfig": {}, "ElectraConfig": {}, "BigBirdConfig": {}, "RoFormerConfig": {},
    "XLMConfig": {"n_words": VOCABULARY, "emb_dim": 32, "n_layers": 2, "n_heads": 4},
    "Gemma3TextConfig": {"use_bidirectional_attention": True, "head_dim": 8},
    "CpmAntConfig": {},  # what stands before the text is seen from both sides
    "LlamaConfig": {"is_causal": False},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", BIDIRECTIONAL)
def test_a_model_that_sees_later_tokens_is_found_out(config: str, dtype: torch.dtype) -> None:
    """With random weights as small as transformers draws them: what leaks is then least."""
    model = made(config, **BIDIRECTIONAL[config]).to(dtype)
    with pytest.raises(ModelError, match="sees later tokens") as refusal:
        check_causal(model, name="the teacher", vocabulary_size=VOCABULARY)
    assert type(model).__name__ in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("config", ["BertConfig", "RobertaConfig", "MixtralConfig", "MambaConfig", "GPT2Config"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_causal_model_passes(config: str, dtype: torch.dtype) -> None:
    decoder = {"is_decoder": True} if config in ("BertConfig", "RobertaConfig") else {}
    experts = {"num_local_experts": 4, "num_key_value_heads": 2} if config == "MixtralConfig" else {}
    model = made(config, **decoder, **experts).to(dtype)
    assert not sees_later_tokens(model, vocabulary_size=VOCABULARY)


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("block", range(2, 17))
def test_a_model_that_sees_to_the_end_of_a_block_is_found_out(
    block: int, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As models of block diffusion do; the first block may be a short one."""
    model = model_of("llama")

    def seen(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return torch.div(k - first, block, rounding_mode="floor") <= torch.div(q - first, block, rounding_mode="floor")

    inner, places = model.model, torch.arange(64)
    mask = torch.where(seen(places[:, None], places[None]), 0.0, float("-inf"))

    def blockwise(**given: Any) -> Any:
        size = given["inputs_embeds"].shape[1]
        return mask[None, None, :size, :size]

    monkeypatch.setattr(sys.modules[type(inner).__module__], "create_causal_mask", blockwise)
    assert sees_later_tokens(model, vocabulary_size=300)


class RoundedByLoad(torch.nn.Module):
    """Rounds a token otherwise for other tokens of its batch, as kernels do that run an expert's tokens together."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        load = int((hidden.flatten(0, -2).argmax(-1) * torch.arange(1, 1 + hidden[..., 0].numel())).sum())
        noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(load))
        return self.inner((hidden.float() * (1 + 2e-3 * noise)).to(hidden.dtype))


def test_rounding_that_changes_with_the_batch_is_no_look_ahead() -> None:
    model = made("MixtralConfig", num_local_experts=4, num_key_value_heads=2).to(torch.bfloat16)
    for block in model.model.layers:
        block.mlp.experts.down_proj.data *= 1000  # else they hardly matter
        block.mlp = RoundedByLoad(block.mlp)
    assert not sees_later_tokens(model, vocabulary_size=VOCABULARY)
    model.float()
    assert sees_later_tokens(model, vocabulary_size=VOCABULARY)  # nothing rounds so much in float32


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss", "qwen3", "gpt2"])
def test_windows_sinks_and_soft_caps_are_causal(architecture: str) -> None:
    assert not sees_later_tokens(model_of(architecture), vocabulary_size=300)


def test_a_probe_leaves_the_model_as_it_was() -> None:
    model = tiny_model().train()
    model.config.attention_dropout = 0.5
    state = torch.get_rng_state()
    assert not sees_later_tokens(model, vocabulary_size=300) and isolates_packed_segments(model, vocabulary_size=300)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(weights.grad is None for weights in model.parameters())


@pytest.mark.parametrize(
    ("said", "told"), [(128, "takes at most 128 tokens, rows have up to"), (10**6, "cannot run a row of")]
)
def test_a_teacher_with_fewer_positions_than_rows_have_tokens_is_refused(said: int, told: str) -> None:
    """Learned ones; by its config, or where that does not say how many there are by running it."""
    model = model_of("gpt2")
    model.config.n_positions = said
    targets = StoredTargets(TopK(8, (1.0,), "float32", 300))
    with pytest.raises(ModelError, match=rf"GPT2LMHeadModel\)? {told} 2100.*; lower sequence.length") as refusal:
        Teacher.of(model, targets=targets, layout="documents", pad_id=0, longest=2100)
    assert "\n" not in str(refusal.value)


def test_positions_that_begin_behind_padding_are_fewer_than_the_config_says() -> None:
    model = made("RobertaConfig", is_decoder=True, max_position_embeddings=40, pad_token_id=1)
    most = most_tokens(model)
    assert most == 38
    with torch.no_grad():
        assert model(torch.full((1, most), 7)).logits.shape[1] == most
        with pytest.raises((RuntimeError, IndexError)):
            model(torch.full((1, most + 1), 7))
    check_length(model, name="the teacher", longest=most)
    with pytest.raises(ModelError, match="takes at most 38 tokens"):
        check_length(model, name="the teacher", longest=most + 1)


def _bert(folder: Path) -> Path:
    made("BertConfig", vocab_size=300).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_masked_language_model_is_no_teacher(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the teacher .* sees later tokens.*every label; use a causal language model"):
        build_cache(tiny_recipe(tmp_path / "c", teacher=_bert(tmp_path / "bert")))


def test_nor_is_a_student_made_of_it_or_measured(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="sees later tokens"):
        init_student(str(_bert(tmp_path / "bert")), layers="first:1", output=tmp_path / "student")
    assert not (tmp_path / "student").exists()
    cache = Cache.open(tiny_cache(tmp_path / "c"))
    with pytest.raises(ModelError, match="the model to evaluate .* sees later tokens"):
        quality(made("BertConfig", vocab_size=300), held_out_rows(cache, limit=2), cache, batch_rows=2)
