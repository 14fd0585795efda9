"""A model's output layer as math: logits = cap(scale · (W·h + b)), with h the layer's own input.

Found by trying it on a few tokens, so it holds for any architecture whose output layer is a matrix: tied or not, with a
bias, with scaled (Granite, Cohere, Falcon-H1) or soft-capped logits (Gemma 2), with an encoder's transform before it (BERT).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from teachercache.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
HALF = (torch.float16, torch.bfloat16)
REMEDY = "store its targets with targets.logits.kind: top-k"


@dataclass(frozen=True, eq=False)
class OutputLayer:
    """`matrix_VD` is the model's own, in its own precision, V that of the tokenizer; `bias_V` float32, scale inside.

    Logits are float32, and summed as such: those that a half-precision model gives itself are rounded to 8 or 11 bits.
    """

    matrix_VD: Tensor
    bias_V: Tensor | None
    scale: float
    softcap: float | None

    @classmethod
    @torch.inference_mode()
    def of(cls, model: PreTrainedModel, *, vocabulary_size: int) -> OutputLayer:
        """Read it off a loaded model, and check that it rebuilds the model's own logits.

        Raises `ModelError`, with the remedy, when they differ by more than the model's precision explains.
        """
        module = model.get_output_embeddings()
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() != 2 or len(weight) < vocabulary_size:
            raise ModelError(f"{type(model).__name__} has no output matrix that a sketch could be made of; {REMEDY}")
        matrix_VD, bias = weight.detach()[:vocabulary_size], getattr(module, "bias", None)
        bias_V = None if bias is None else bias.detach()[:vocabulary_size].float()
        softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        hidden_ND, logits_NV = _try(model, vocabulary_size)
        plain_NV = cls(matrix_VD, bias_V, 1.0, None).logits(hidden_ND)
        wanted_NV = softcap * torch.atanh((logits_NV / softcap).clamp(-1 + 1e-6, 1 - 1e-6)) if softcap else logits_NV
        scale = float((wanted_NV * plain_NV).sum() / plain_NV.square().sum().clamp_min(1e-30))
        scale = 1.0 if abs(scale - 1) < 1e-3 else scale
        layer = cls(matrix_VD, None if bias_V is None else bias_V * scale, scale, softcap)
        error = layer.error(hidden_ND, logits_NV)
        if not error <= TOLERANCE.get(weight.dtype, 6e-2):
            raise ModelError(
                f"the logits of {type(model).__name__} are not those of its output layer (they differ by {error:.1%} "
                f"of the largest), so a sketch of its input cannot rebuild them; {REMEDY}"
            )
        return layer

    @cached_property
    def weight_VD(self) -> Tensor:
        """The matrix with the scale inside, float32."""
        return self.matrix_VD.float() * self.scale if self.scale != 1 else self.matrix_VD.float()

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """float32 [N, V] of what enters the layer."""
        if self.matrix_VD.dtype in HALF and self.matrix_VD.is_cuda:  # there a matmul can sum, and answer, in float32
            logits_NV = torch.mm(hidden_ND.to(self.matrix_VD.dtype), self.matrix_VD.T, out_dtype=torch.float32)
            if self.scale != 1:
                logits_NV *= self.scale
        else:
            logits_NV = hidden_ND.float() @ self.weight_VD.T
        if self.bias_V is not None:
            logits_NV += self.bias_V
        return logits_NV if self.softcap is None else torch.tanh_(logits_NV.div_(self.softcap)).mul_(self.softcap)

    def on(self, device: str) -> OutputLayer:
        """The layer on another device."""
        bias_V = None if self.bias_V is None else self.bias_V.to(device)
        return type(self)(self.matrix_VD.to(device), bias_V, self.scale, self.softcap)

    def error(self, hidden_ND: Tensor, logits_NV: Tensor) -> float:
        """Returns the distance of logits from those of this layer, as a share of the largest."""
        gap = (self.logits(hidden_ND) - logits_NV).abs().max()
        return float(gap / logits_NV.abs().max().clamp_min(1e-30))

    @torch.inference_mode()
    def follows_body(self, model: PreTrainedModel) -> bool:
        """Tells whether the model's body returns what enters this layer, up to rounding; tried on a few tokens."""
        body, vocabulary = model.base_model, len(self.matrix_VD)
        if body is model:
            return False
        hidden_ND = body(input_ids=_probe(model, vocabulary), use_cache=False)[0].flatten(0, 1)
        logits_NV = _try(model, vocabulary)[1]
        error = self.error(hidden_ND, logits_NV) if hidden_ND.shape[-1] == self.matrix_VD.shape[1] else 1.0
        return error <= (1e-5 if self.matrix_VD.dtype in (torch.float32, torch.float64) else 1e-2)


def layer_after_body(model: PreTrainedModel, *, vocabulary_size: int | None = None) -> OutputLayer | None:
    """The output layer, or as many of its rows, if the model's logits are what it makes of the body's output."""
    if vocabulary_size is None:
        vocabulary_size = len(getattr(model.get_output_embeddings(), "weight", ()))
    try:
        layer = OutputLayer.of(model, vocabulary_size=vocabulary_size)
    except ModelError:
        return None
    return layer if layer.follows_body(model) else None


@contextmanager
def recorded_input(model: PreTrainedModel) -> Iterator[list[Tensor]]:
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


def _probe(model: PreTrainedModel, vocabulary_size: int) -> Tensor:
    known = min(vocabulary_size, len(getattr(model.get_input_embeddings(), "weight", range(vocabulary_size))))
    return torch.linspace(0, known - 1, steps=min(16, known), device=model.device).long()[None]


def _try(model: PreTrainedModel, vocabulary_size: int) -> tuple[Tensor, Tensor]:
    """Returns the input of the layer [N, D] and the model's own logits, float32 [N, V]."""
    with recorded_input(model) as inputs:
        logits = model(input_ids=_probe(model, vocabulary_size), use_cache=False).logits
    if len(inputs) != 1 or inputs[0].shape[:-1] != logits.shape[:-1]:  # code of its own, e.g. with its weight alone
        raise ModelError(f"{type(model).__name__} does not call its output layer once for its logits; {REMEDY}")
    return inputs[0].flatten(0, 1).float(), logits.flatten(0, 1)[:, :vocabulary_size].float()
