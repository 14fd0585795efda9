"""Tiny seeded models of several architectures: what differs between them is how attention is made."""

from __future__ import annotations

from typing import Any

WIDTH, HEADS, KEY_HEADS, BLOCKS, CONTEXT = 32, 4, 2, 3, 128


def model_of(
    architecture: str, *, vocabulary: int = 300, attention: str = "sdpa", seed: int = 0, **settings: Any
) -> Any:
    """`llama`, `qwen3` (norms of heads), `qwen2` (biases), `gemma2` (soft cap, windows, norms of another kind), `gpt_oss`
    (sinks) or `gpt2` (one matrix for queries, keys and values; learned positions). `settings` are of the config of those
    that rotate."""
    import torch
    import transformers

    torch.manual_seed(seed)
    attention = "eager" if architecture == "gpt_oss" else attention  # transformers has no other for it on CPUs
    shared = {"vocab_size": vocabulary, "attn_implementation": attention}
    sizes: dict[str, Any] = {
        "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS, "max_position_embeddings": CONTEXT, "head_dim": WIDTH // HEADS,
    }  # fmt: skip
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if architecture == "gpt2":
        config: Any = transformers.GPT2Config(
            **shared, n_embd=WIDTH, n_layer=BLOCKS, n_head=HEADS, n_positions=CONTEXT, bos_token_id=0, eos_token_id=0
        )
    else:
        names = {"gpt_oss": "GptOss", "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2"}
        own: dict[str, Any] = {
            "gemma2": {"sliding_window": 8, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
            "gpt_oss": {
                "sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
        }.get(architecture, {})  # fmt: skip
        sizes |= settings
        config = getattr(transformers, f"{names[architecture]}Config")(**shared, **sizes, **special, **own)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.dim() == 2:
                weights.mul_(6)
            elif "norm" in name or name.endswith(("bias", "sinks")):  # what a norm or a bias does must show
                weights.add_(torch.randn_like(weights) * 0.2)
    return model
