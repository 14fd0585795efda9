"""The loss inside the student's output layer, so that a batch's logits never exist.

The layer keeps its place in the model and its hooks: ZeRO 3 gathers its weights before it runs, and again for the
backward pass, because the loss leaves through the layer's own output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# (hidden states [B, S, D], weight [L, D], bias [L] or None, soft cap or None) -> the loss, a scalar
LossOfHidden = Callable[[Tensor, Tensor, Tensor | None, float | None], Tensor]


def takes_loss(model: Any) -> bool:
    """Whether the model's output layer is a plain matrix, which `loss_for_logits` knows how to replace."""
    return type(model.get_output_embeddings()) is torch.nn.Linear


@contextmanager
def loss_for_logits(model: Any, loss: LossOfHidden) -> Iterator[None]:
    """While it is open, the model returns the loss, [1, 1, 1], where it would return logits.

    A soft cap is handed to the loss instead of being applied to it. What else a model does to its logits shows in what
    it returns: compare that with the loss.
    """
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)

    def forward(hidden_BSD: Tensor) -> Tensor:
        return loss(hidden_BSD, layer.weight, layer.bias, softcap).view(1, 1, 1)

    before = layer.__dict__.get("forward")  # somebody else's, e.g. accelerate's
    layer.forward = forward
    if softcap is not None:
        config.final_logit_softcapping = None
    try:
        yield
    finally:
        if softcap is not None:
            config.final_logit_softcapping = softcap
        if before is None:
            del layer.forward
        else:
            layer.forward = before
