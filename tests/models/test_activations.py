"""Layers are counted the same way everywhere, and recording them changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from teachercache.errors import ModelError
from teachercache.models.activations import check_attention, recorded
from teachercache.targets.layers.attention import log_attention, sees

from tiny_models import BLOCKS, HEADS, model_of

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma2", "gpt2", "gpt_oss"]
EAGER = ("gemma2", "gpt_oss")  # transformers' fast kernel has no soft cap, and no sinks
IDS_BS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hidden_states_are_those_of_transformers_but_for_the_last_which_is_before_the_norm(architecture: str) -> None:
    model = model_of(architecture)
    with torch.no_grad(), recorded(model, hidden=range(BLOCKS + 1)) as activations:
        outputs = model(IDS_BS, use_cache=False, output_hidden_states=True)
    assert sorted(activations.hidden) == [0, 1, 2, 3] and len(outputs.hidden_states) == 4
    for layer in range(BLOCKS):
        torch.testing.assert_close(activations.hidden[layer], outputs.hidden_states[layer], rtol=0, atol=0)
    norm = model.transformer.ln_f if architecture == "gpt2" else model.model.norm
    with torch.no_grad():
        torch.testing.assert_close(norm(activations.hidden[BLOCKS]), outputs.hidden_states[BLOCKS])


def test_hidden_state_0_is_the_embeddings() -> None:
    model = model_of("llama")
    with torch.no_grad(), recorded(model, hidden=[0]) as activations:
        model(IDS_BS, use_cache=False)
    torch.testing.assert_close(activations.hidden[0], model.get_input_embeddings()(IDS_BS), rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_of_a_block_is_the_one_that_transformers_returns(architecture: str) -> None:
    model, eager = model_of(architecture), model_of(architecture, attention="eager")
    with torch.no_grad():
        plain, expected = model(IDS_BS, use_cache=False).logits, eager(IDS_BS, use_cache=False, output_attentions=True)
    with torch.no_grad(), recorded(eager if architecture in EAGER else model, attention=[1, 2, 3]) as activations:
        logits = (eager if architecture in EAGER else model)(IDS_BS, use_cache=False).logits
    torch.testing.assert_close(logits, expected.logits if architecture in EAGER else plain, rtol=0, atol=0)
    for layer in (1, 2, 3):
        heads = activations.attention[layer]
        seen_BCS = sees(torch, torch.zeros(2, 24, dtype=torch.int64), window=heads.window)
        found = log_attention(
            heads.queries_BHSE, heads.keys_BKSE, seen_BCS, scaling=heads.scaling, softcap=heads.softcap,
            sinks_H=heads.sinks_H,
        ).exp()  # fmt: skip
        assert (heads.sinks_H is not None) == (architecture == "gpt_oss")
        assert found.shape == (2, HEADS, 24, 24)
        if architecture == "gemma2":
            assert heads.softcap == 5.0 and heads.window == (8 if layer in (1, 3) else None)
        torch.testing.assert_close(found, expected.attentions[layer - 1], atol=1e-5, rtol=1e-4)


def test_the_kernel_and_its_registry_are_as_before() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, before = model_of("llama"), dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    with recorded(model, attention=[1]):
        assert model.config._attn_implementation == "sdpa"
    assert ALL_ATTENTION_FUNCTIONS._local_mapping == before
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.model.layers)


def test_recordings_of_two_models_do_not_mix() -> None:
    one, other = model_of("llama"), model_of("llama", seed=1)
    with torch.no_grad(), recorded(one, attention=[2]) as first, recorded(other, attention=[2]) as second:
        one(IDS_BS, use_cache=False)
        assert not second.attention
        other(IDS_BS, use_cache=False)
    assert not torch.equal(first.attention[2].queries_BHSE, second.attention[2].queries_BHSE)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_recorded_carries_gradients(checkpointing: bool) -> None:
    def gradient(model: Any, *, use_checkpoints: bool) -> torch.Tensor:
        model.train()
        if use_checkpoints:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with recorded(model, hidden=[1, 2], attention=[2]) as activations:
            loss = model(IDS_BS, use_cache=False).logits.square().mean()
            heads = activations.attention[2]
            loss = loss + activations.hidden[1].square().mean() + (heads.queries_BHSE[:, :2] * heads.keys_BKSE).mean()
        loss.backward()
        return torch.cat([weights.grad.flatten() for weights in model.parameters()])

    expected = gradient(model_of("llama"), use_checkpoints=False)
    torch.testing.assert_close(gradient(model_of("llama"), use_checkpoints=checkpointing), expected)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"hidden": [4]}, r"hidden: there is no layer 4; LlamaForCausalLM has layers 0 \(the embeddings\) to 3"),
        ({"attention": [0]}, r"attention: there is no layer 0; LlamaForCausalLM has layers 1 to 3"),
    ],
)
def test_a_layer_that_is_not_there_is_refused(chosen: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message), recorded(model_of("llama"), **chosen):
        pass


def test_attention_whose_mask_hides_more_than_its_window_is_refused() -> None:
    """Qwen2-MoE's kernel is told of no window: its mask has one."""
    from transformers import AutoModelForCausalLM, Qwen2MoeConfig

    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=300, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts=2, num_experts_per_tok=1,
        use_sliding_window=True, sliding_window=8, max_window_layers=0, max_position_embeddings=128, pad_token_id=0,
        layer_types=["sliding_attention"] * 2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad(), recorded(model, attention=[1, 2]) as activations:
        model(IDS_BS[:1], use_cache=False)
    with pytest.raises(ModelError, match=r"block [12] of Qwen2MoeForCausalLM is not what its queries and keys say"):
        check_attention(activations, [1, 2], model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_that_is_what_was_recorded_passes(architecture: str) -> None:
    model = model_of(architecture, attention="eager" if architecture in EAGER else "sdpa")
    with torch.no_grad(), recorded(model, attention=[1, 2, 3]) as activations:
        model(IDS_BS[:1], use_cache=False)
    check_attention(activations, [1, 2, 3], model)


def test_attention_that_passes_by_unseen_is_named_with_what_still_works() -> None:
    from transformers import AutoModelForCausalLM, BloomConfig

    model = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4)).eval()
    with torch.no_grad(), recorded(model, hidden=[1], attention=[2]) as activations:
        model(IDS_BS, use_cache=False)
    assert activations.hidden[1].shape == (2, 24, 32)
    with pytest.raises(
        ModelError, match=r"block 2 of BloomForCausalLM .* cannot be recorded; hidden states and logits can"
    ):
        check_attention(activations, [2], model)
