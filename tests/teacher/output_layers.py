"""Tiny models whose output layers differ in everything that one can have, and what enters them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from teachercache.teacher.output_layer import recorded_input

from builders import tiny_model

V = 300
SIZES = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def scaled_up(model: Any) -> Any:
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() == 2:
                weights.mul_(20)
    return model.eval()


def gemma2() -> Any:
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, head_dim=8, num_key_value_heads=2, final_logit_softcapping=10.0)
    return scaled_up(Gemma2ForCausalLM(config))


def granite() -> Any:
    torch.manual_seed(0)
    return scaled_up(GraniteForCausalLM(GraniteConfig(**SIZES, num_key_value_heads=2, logits_scaling=4.0)))


def cohere() -> Any:
    torch.manual_seed(0)
    return scaled_up(CohereForCausalLM(CohereConfig(**SIZES, num_key_value_heads=2, logit_scale=0.25)))


def bert() -> Any:
    torch.manual_seed(0)
    model = scaled_up(BertForMaskedLM(BertConfig(**SIZES)))
    with torch.no_grad():
        model.get_output_embeddings().bias.normal_()
    return model


MODELS = {
    "llama tied": lambda: tiny_model(vocabulary=V),
    "llama untied": lambda: tiny_model(vocabulary=V, tied=False),
    "llama padded": lambda: tiny_model(vocabulary=V + 20),
    "gemma2 (soft cap)": gemma2,
    "granite (divided)": granite,
    "cohere (multiplied)": cohere,
    "bert (transform, bias)": bert,
}


def observe(
    model: Any, *, rows: int = 24, length: int = 48, seed: int = 0
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Hidden states that enter the output layer, and the model's own logits over V tokens, row by row."""
    ids = torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode(), recorded_input(model) as inputs:
        logits = model(input_ids=ids).logits[..., :V].float()
    return list(inputs[0].float()), list(logits)
