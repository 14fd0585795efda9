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


def composite_model(name: str, *, vocabulary: int = 300) -> Any:
    """`gemma3`, `llava`, `mistral3` or `qwen2_5_vl`: a decoder of text beside an encoder of images, each with its own config
    inside the model's."""
    import torch
    import transformers as t

    from teachercache.models.loading import auto_class

    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    text = {**sizes, "vocab_size": vocabulary, "num_key_value_heads": KEY_HEADS, "max_position_embeddings": CONTEXT}
    vision = {**sizes, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    image = vocabulary - 1
    if name == "gemma3":
        text |= {"head_dim": 8, "sliding_window": 16}
        config: Any = t.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    elif name == "llava":
        parts = {"text_config": t.LlamaConfig(**text), "vision_config": t.CLIPVisionConfig(**vision)}
        config = t.LlavaConfig(**parts, image_token_id=image)
    elif name == "mistral3":
        eyes = t.PixtralVisionConfig(**vision, head_dim=8)
        config = t.Mistral3Config(
            text_config=t.MistralConfig(**text, head_dim=8), vision_config=eyes, image_token_index=image
        )
    else:
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
        eyes = {
            "depth": 1,
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_heads": HEADS,
            "out_hidden_size": WIDTH,
        }
        config = t.Qwen2_5_VLConfig(
            text_config={**text, "rope_parameters": rope}, vision_config={**eyes, "fullatt_block_indexes": [0]},
            image_token_id=image, video_token_id=image - 1, vision_start_token_id=image - 2,
        )  # fmt: skip
    model = auto_class(config).from_config(config).eval()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() == 2:
                weights.mul_(6)
    return model
