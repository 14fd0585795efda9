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

from teachercache.objective.logits.student_output import StudentOutput

LossOfOutput = Callable[[StudentOutput], Tensor]  # a scalar


def output_with_loss(model: Any, inputs: dict[str, Any], loss: LossOfOutput, *, in_layer_of: Any) -> tuple[Tensor, Any]:
    """One forward pass: the loss on its graph, and what the model returned. The model is called as it is given: under ZeRO 3 it
    gathers its weights.

    `in_layer_of` is the same model unwrapped, if `takes_loss` accepts it, else None: without logits of a whole batch.
    """
    if in_layer_of is None:
        outputs = model(**inputs, use_cache=False)
        return loss(StudentOutput.of_logits(outputs.logits)), outputs
    with loss_for_logits(in_layer_of, loss):
        outputs = model(**inputs, use_cache=False)
    return outputs.logits.reshape(()), outputs


def takes_loss(model: Any, forward: Any = None) -> bool:
    """Tells whether what `loss_for_logits` puts in the place of logits comes out of the model as it is.

    Tried on two tokens, by `forward` (the model as training wraps it): some models scale their logits, or write to them.
    Nothing is drawn at random, and every process finds the same.
    """
    if type(model.get_output_embeddings()) is not torch.nn.Linear:
        return False
    run = forward or model
    was_training = run.training
    run.eval()
    try:
        with torch.no_grad(), loss_for_logits(model, lambda output: output.values_BSA.new_ones(())):
            ids_BS = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
            returned = run(input_ids=ids_BS, use_cache=False).logits
        return tuple(returned.shape) == (1, 1, 1) and float(returned) == 1.0
    except (RuntimeError, IndexError, ValueError, TypeError, AttributeError):
        return False
    finally:
        run.train(was_training)


@contextmanager
def loss_for_logits(model: Any, loss: LossOfOutput) -> Iterator[None]:
    """While it is open, the model returns the loss, [1, 1, 1], where it would return logits.

    A soft cap is handed to the loss instead of being applied to it. For models that `takes_loss` accepts.
    """
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)

    def forward(hidden_BSD: Tensor) -> Tensor:
        return loss(StudentOutput.of_hidden(hidden_BSD, layer.weight, layer.bias, softcap)).view(1, 1, 1)

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
