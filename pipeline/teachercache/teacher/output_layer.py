"""A model's output layer as math: logits = cap(scale · (W·h + b)), with h the layer's own input.

Found by trying it on a few tokens, so it holds for any architecture whose output layer is a matrix: tied or not, with a
bias, with scaled (Granite, Cohere, Falcon-H1) or soft-capped logits (Gemma 2), with an encoder's transform before it (BERT).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from teachercache.errors import ModelError

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
REMEDY = "store its targets with targets.logits.kind: top-k"


@dataclass(frozen=True)
class OutputLayer:
    """W [V, D] with the scale inside, b [V] likewise, and the soft cap; float32, V that of the tokenizer."""

    weight_VD: Tensor
    bias_V: Tensor
    softcap: float | None

    @classmethod
    @torch.inference_mode()
    def of(cls, model: Any, *, vocabulary_size: int) -> OutputLayer:
        """Read it off a loaded model, and check that it rebuilds the model's own logits.

        Raises `ModelError`, with the remedy, when they differ by more than the model's precision explains.
        """
        module = model.get_output_embeddings()
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() != 2 or len(weight) < vocabulary_size:
            raise ModelError(f"{type(model).__name__} has no output matrix that a sketch could be made of; {REMEDY}")
        softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        bias = getattr(module, "bias", None)
        weight_VD = weight[:vocabulary_size].float()
        bias_V = bias[:vocabulary_size].float() if bias is not None else weight_VD.new_zeros(vocabulary_size)
        hidden_ND, logits_NV = _try(model, vocabulary_size)
        plain_NV = hidden_ND @ weight_VD.T + bias_V
        wanted_NV = softcap * torch.atanh((logits_NV / softcap).clamp(-1 + 1e-6, 1 - 1e-6)) if softcap else logits_NV
        scale = float((wanted_NV * plain_NV).sum() / plain_NV.square().sum().clamp_min(1e-30))
        scale = 1.0 if abs(scale - 1) < 1e-3 else scale
        layer = cls(weight_VD * scale, bias_V * scale, softcap)
        error = (layer.logits(hidden_ND) - logits_NV).abs().max() / logits_NV.abs().max().clamp_min(1e-30)
        if not error <= TOLERANCE.get(weight.dtype, 6e-2):
            raise ModelError(
                f"the logits of {type(model).__name__} are not those of its output layer (they differ by {float(error):.1%} "
                f"of the largest), so a sketch of its input cannot rebuild them; {REMEDY}"
            )
        return layer

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """float32 [N, V]."""
        logits_NV = hidden_ND.float() @ self.weight_VD.T
        logits_NV += self.bias_V
        return logits_NV if self.softcap is None else torch.tanh_(logits_NV.div_(self.softcap)).mul_(self.softcap)


@contextmanager
def recorded_input(model: Any) -> Iterator[list[Tensor]]:
    """While it is open, what enters the output layer is appended to the list, [B, S, D] each."""
    inputs: list[Tensor] = []
    layer = model.get_output_embeddings()
    if layer is None:
        yield inputs
        return
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        handle.remove()


def _try(model: Any, vocabulary_size: int) -> tuple[Tensor, Tensor]:
    ids = torch.linspace(0, vocabulary_size - 1, steps=min(16, vocabulary_size), device=model.device).long()[None]
    with recorded_input(model) as inputs:
        logits = model(input_ids=ids).logits
    return inputs[0].flatten(0, 1).float(), logits.flatten(0, 1)[:, :vocabulary_size].float()
