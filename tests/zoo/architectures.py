"""The architectures of the zoo: what `transformers` can make tiny, and in what each differs from the others.

A row of the table is an architecture's name, its config's class, and the settings that it wants beside `SIZES`: small
windows, experts, scales and soft caps, so that what sets it apart is at work in rows of 40 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VOCABULARY, WIDTH, BLOCKS, HEADS, CONTEXT = 300, 32, 2, 4, 128
ORIGINAL_CONTEXT = 32  # of models whose rotary factors change beyond it: some rows are longer, some shorter
END = "<|endoftext|>"  # a name that no family's tokenizer class adds to
SHARPER = 6  # weights are multiplied by it: a fresh model's distributions are all but uniform, and hide what differs

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 0,
}  # fmt: skip
GPT2_SIZES = {"n_embd": WIDTH, "n_layer": BLOCKS, "n_head": HEADS, "n_positions": CONTEXT}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": HEADS,
}  # fmt: skip
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32}
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
DYNAMIC_ROTARY = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
LONG_ROTARY = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4,
    "original_max_position_embeddings": ORIGINAL_CONTEXT,
}  # fmt: skip
VISION = {
    "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": HEADS,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """`config` is a class of transformers; `begins` says whether its family's tokenizers put a token in front of a text."""

    name: str
    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    differs: str = ""
    begins: bool = False
    text: str | None = None  # class of the text model's config, where that is one part of several

    def model(self, *, seed: int = 0) -> Any:
        """Fresh and seeded, on the CPU, in evaluation mode."""
        import torch
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(self._config()).eval()
        with torch.no_grad():
            for weights in model.parameters():
                if weights.dim() == 2:
                    weights.mul_(SHARPER)
        return model

    def save(self, folder: Path, *, seed: int = 0) -> Path:
        """A folder as users have it: the model and a tokenizer of its family's manner."""
        self.model(seed=seed).save_pretrained(folder)
        tokenizer(begins=self.begins).save_pretrained(folder)
        return folder

    def _config(self) -> Any:
        """Without dropout: processes draw each their own."""
        config = self._made_config()
        for part in (config, config.get_text_config()):
            for name, value in vars(part).items():
                if "drop" in name and isinstance(value, float):
                    setattr(part, name, 0.0)
        return config

    def _made_config(self) -> Any:
        import transformers

        known = getattr(transformers, self.text or self.config)()
        sizes = {**{name: value for name, value in SIZES.items() if hasattr(known, name)}, **self.settings}
        if self.text is None:
            return getattr(transformers, self.config)(**sizes)
        special = {name: sizes[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        inner = getattr(transformers, self.text)(**sizes)
        return getattr(transformers, self.config)(text_config=inner, vision_config=dict(VISION), **special)


def tokenizer(*, begins: bool) -> Any:
    """A byte-level tokenizer of `VOCABULARY` tokens that ends rows with `END`, and begins them with `<s>` if it should."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    from builders import byte_level_bpe, sentences

    inner = byte_level_bpe(sentences(200), vocabulary=VOCABULARY, special=[END, "<s>"])
    if begins:
        inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, pad_token=END, bos_token="<s>")


ARCHITECTURES = (
    Architecture("Llama", "LlamaConfig", begins=True),
    Architecture(
        "Llama, dynamic NTK", "LlamaConfig",
        {"max_position_embeddings": ORIGINAL_CONTEXT, "rope_parameters": DYNAMIC_ROTARY},
        "rotary frequencies that follow a text's length", begins=True,
    ),
    Architecture(
        "Llama 4", "Llama4TextConfig",
        {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 8},
        "experts; attention in chunks", begins=True,
    ),
    Architecture("Mistral", "MistralConfig", {"sliding_window": 8}, "a window", begins=True),
    Architecture(
        "Ministral", "MinistralConfig", {"sliding_window": 8, "head_dim": 8},
        "a window in some blocks", begins=True,
    ),
    Architecture("Mixtral", "MixtralConfig", {"num_local_experts": 4}, "experts", begins=True),
    Architecture("Qwen 2", "Qwen2Config", {}, "biases of queries and keys"),
    Architecture("Qwen 2 MoE", "Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 32}, "experts"),
    Architecture("Qwen 3", "Qwen3Config", {"head_dim": 8}, "norms of heads"),
    Architecture("Qwen 3 MoE", "Qwen3MoeConfig", {**EXPERTS, "head_dim": 8}, "experts; norms of heads"),
    Architecture(
        "Qwen 3 Next", "Qwen3NextConfig", {**EXPERTS, **LINEAR, "shared_expert_intermediate_size": 32, "head_dim": 8},
        "linear attention; experts",
    ),
    Architecture("Qwen 3.5", "Qwen3_5TextConfig", {**LINEAR, "head_dim": 8}, "linear attention"),
    Architecture("Gemma", "GemmaConfig", {"head_dim": 8}, "scaled embeddings", begins=True),
    Architecture(
        "Gemma 2", "Gemma2Config",
        {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0},
        "soft caps on scores and logits; windows", begins=True,
    ),
    Architecture(
        "Gemma 3, text", "Gemma3TextConfig", {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
        "windows; norms of heads", begins=True,
    ),
    Architecture(
        "Gemma 3, multimodal", "Gemma3Config", {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
        "a text model inside a larger one", begins=True, text="Gemma3TextConfig",
    ),
    Architecture("Phi", "PhiConfig", {}, "blocks in parallel; a bias on the logits"),
    Architecture("Phi 3", "Phi3Config", {}, "one matrix for queries, keys and values", begins=True),
    Architecture(
        "Phi 3, longrope", "Phi3Config",
        {"original_max_position_embeddings": ORIGINAL_CONTEXT, "rope_parameters": LONG_ROTARY},
        "rotary factors that follow a text's length", begins=True,
    ),
    Architecture("Phi MoE", "PhimoeConfig", LOCAL_EXPERTS, "experts; a bias on the logits", begins=True),
    Architecture(
        "Granite", "GraniteConfig",
        {"logits_scaling": 8.0, "embedding_multiplier": 3.0, "attention_multiplier": 0.5, "residual_multiplier": 0.4},
        "scaled logits",
    ),
    Architecture("Granite MoE", "GraniteMoeConfig", {**LOCAL_EXPERTS, "logits_scaling": 8.0}, "experts; scaled logits"),
    Architecture(
        "Granite hybrid", "GraniteMoeHybridConfig",
        {**LOCAL_EXPERTS, **MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32, "mamba_expand": 2},
        "state space and attention; experts",
    ),
    Architecture("Cohere", "CohereConfig", {"logit_scale": 0.0625}, "scaled logits; blocks in parallel", begins=True),
    Architecture(
        "Cohere 2", "Cohere2Config", {"logit_scale": 0.25, "sliding_window": 8, "head_dim": 8}, "scaled logits; windows",
        begins=True,
    ),
    Architecture("OLMo", "OlmoConfig", {}, "norms without weights"),
    Architecture("OLMo 2", "Olmo2Config", {}, "norms behind blocks"),
    Architecture("OLMo 3", "Olmo3Config", {"sliding_window": 8}, "windows; norms behind blocks"),
    Architecture("OLMoE", "OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}, "experts"),
    Architecture("SmolLM 3", "SmolLM3Config", {"no_rope_layer_interval": 2}, "blocks without positions"),
    Architecture("StableLM", "StableLmConfig", {}, "rotary on a part of each head"),
    Architecture("StarCoder 2", "Starcoder2Config", {}, "biases everywhere"),
    Architecture("GPT-NeoX", "GPTNeoXConfig", {}, "blocks in parallel"),
    Architecture("GPT-2", "GPT2Config", GPT2_SIZES, "learned positions"),
    Architecture("GPT-Neo", "GPTNeoConfig", {
        "num_layers": BLOCKS, "num_heads": HEADS, "attention_types": [[["global", "local"], 1]], "window_size": 8,
    }, "a window in every other block"),
    Architecture("GPT-J", "GPTJConfig", {**GPT2_SIZES, "rotary_dim": 4}, "a bias on the logits"),
    Architecture("GPT BigCode", "GPTBigCodeConfig", GPT2_SIZES, "one head of keys"),
    Architecture("CodeGen", "CodeGenConfig", {**GPT2_SIZES, "rotary_dim": 4}, "blocks in parallel"),
    Architecture("OPT", "OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": WIDTH}, "learned positions", begins=True),
    Architecture("BLOOM", "BloomConfig", {"n_layer": BLOCKS, "n_head": HEADS}, "positions as a bias of scores"),
    Architecture(
        "MPT", "MptConfig", {"d_model": WIDTH, "n_heads": HEADS, "n_layers": BLOCKS, "max_seq_len": CONTEXT},
        "positions as a bias of scores",
    ),
    Architecture("Falcon", "FalconConfig", {}, "one head of keys"),
    Architecture("Persimmon", "PersimmonConfig", {}, "norms of heads; squared activations"),
    Architecture("Nemotron", "NemotronConfig", {"head_dim": 8}, "norms with an offset"),
    Architecture("GLM 4", "Glm4Config", {"head_dim": 8}, "rotary on a part of each head"),
    Architecture(
        "GLM 4 MoE", "Glm4MoeConfig", {**ROUTED, "head_dim": 8, "first_k_dense_replace": 1},
        "experts, some shared",
    ),
    Architecture("Exaone 4", "Exaone4Config", {"sliding_window": 8, "sliding_window_pattern": 2}, "windows"),
    Architecture("Ernie 4.5", "Ernie4_5Config", {"head_dim": 8}, "rotary on pairs", begins=True),
    Architecture("Seed OSS", "SeedOssConfig", {"head_dim": 8}, "biases of queries and keys"),
    Architecture("Arcee", "ArceeConfig", {}, "squared activations", begins=True),
    Architecture("Apertus", "ApertusConfig", {}, "activations with weights", begins=True),
    Architecture("Helium", "HeliumConfig", {"head_dim": 8}, "rotary on pairs", begins=True),
    Architecture("NanoChat", "NanoChatConfig", {"head_dim": 8}, "a soft cap; norms without weights", begins=True),
    Architecture(
        "DeepSeek V2", "DeepseekV2Config", {**LATENT, **ROUTED, "first_k_dense_replace": 1, "topk_method": "greedy"},
        "compressed keys and values; experts", begins=True,
    ),
    Architecture(
        "DeepSeek V3", "DeepseekV3Config", {**LATENT, **ROUTED, "first_k_dense_replace": 1},
        "compressed keys and values; experts", begins=True,
    ),
    Architecture(
        "MiniCPM 3", "MiniCPM3Config", {**LATENT, "dim_model_base": WIDTH},
        "compressed keys and values; scaled embeddings", begins=True,
    ),
    Architecture(
        "gpt-oss", "GptOssConfig", {**LOCAL_EXPERTS, "head_dim": 8, "sliding_window": 8}, "sinks; windows; experts"
    ),
    Architecture("MiniMax", "MiniMaxConfig", {"num_local_experts": 4, "head_dim": 8}, "linear attention; experts"),
    Architecture(
        "LFM 2", "Lfm2Config", {"layer_types": ["conv", "full_attention"]},
        "short convolutions and attention", begins=True,
    ),
    Architecture("Mamba", "MambaConfig", {"state_size": 4}, "state space, no attention"),
    Architecture(
        "Mamba 2", "Mamba2Config", {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8, "expand": 2},
        "state space, no attention",
    ),
    Architecture("Falcon Mamba", "FalconMambaConfig", {"state_size": 4}, "state space, no attention"),
    Architecture(
        "Falcon-H1", "FalconH1Config", {**MAMBA, "mamba_d_ssm": 64, "lm_head_multiplier": 0.5, "head_dim": 8},
        "state space beside attention; scaled logits",
    ),
    Architecture(
        "Bamba", "BambaConfig", {**MAMBA, "attn_layer_indices": [1], "mamba_expand": 2},
        "state space and attention",
    ),
    Architecture("Jamba", "JambaConfig", {
        "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4,
        "mamba_dt_rank": 4, "use_mamba_kernels": False,
    }, "state space and attention; experts", begins=True),
    Architecture(
        "RWKV", "RwkvConfig", {"attention_hidden_size": WIDTH, "context_length": CONTEXT},
        "linear recurrence",
    ),
    Architecture("xLSTM", "xLSTMConfig", {"num_heads": 4, "num_blocks": 2}, "recurrent; a soft cap of its own"),
    Architecture(
        "RecurrentGemma", "RecurrentGemmaConfig", {"lru_width": WIDTH, "head_dim": 8, "attention_window_size": 8},
        "recurrent, and attention in windows; a soft cap of its own", begins=True,
    ),
    Architecture(
        "XGLM", "XGLMConfig", {"d_model": WIDTH, "num_layers": BLOCKS, "attention_heads": HEADS, "ffn_dim": 64},
        "positions by sines", begins=True,
    ),
    Architecture("BioGPT", "BioGptConfig", {}, "learned positions", begins=True),
    Architecture("BERT as a decoder", "BertConfig", {"is_decoder": True}, "a transform before its output layer"),
    Architecture(
        "RoBERTa as a decoder", "RobertaConfig", {"is_decoder": True, "max_position_embeddings": 140},
        "positions that count from the padding token's",
    ),
    Architecture("BERT", "BertConfig", {}, "sees what follows"),
)  # fmt: skip
