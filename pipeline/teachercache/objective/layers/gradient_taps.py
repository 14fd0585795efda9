"""Gradient taps: the gradient of a term at the activations that it matches, against the gradient that comes from the
layers above.

Each term gets tensors of its own with the numbers that were recorded, and the model goes on with others (see
`activations.recorded`): one backward pass, that of training, leaves every gradient by itself. Nothing is computed twice, and
no gradient is a small difference of large ones. What comes from above is that of the logits' loss and of terms matched
there."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from teachercache.models.activations import Activations
    from teachercache.objective.layers.term import LayerTerm

VECTORS = ("queries_BHSE", "keys_BKSE", "values_BKSE")
Place = tuple[str, int, int]  # hidden or attention, the student's layer, which of its tensors


class GradientTaps:
    """The gradients of one micro-batch, as its backward pass leaves them."""

    def __init__(self) -> None:
        self._own: dict[str, dict[Place, Tensor]] = {}
        self._above: dict[Place, Tensor] = {}
        self._scale: list[Tensor] = []
        self._watched: set[Place] = set()

    def scaled_by(self, total: Tensor) -> None:
        """`total` is the sum over positions that training scales before its backward pass; gradients are taken without that."""
        total.register_hook(self._scale.append)

    def apart(self, name: str, term: LayerTerm, activations: Activations) -> Activations:
        """The activations, with tensors of the term's own for what it matches."""
        layers = sorted({student for student, _ in term.pairs})
        gradients = self._own.setdefault(name, {})
        recorded = dict(getattr(activations, term.of))
        for layer in layers:
            self._watch(term.of, layer, activations)
            if term.of == "hidden":
                recorded[layer] = _keep(recorded[layer].view_as(recorded[layer]), (term.of, layer, 0), gradients)
            else:
                parts = {vector: getattr(recorded[layer], vector) for vector in VECTORS}
                kept = {
                    vector: _keep(part.view_as(part), (term.of, layer, number), gradients)
                    for number, (vector, part) in enumerate(parts.items())
                }
                recorded[layer] = replace(recorded[layer], **kept)
        return replace(activations, **{term.of: recorded})

    def _watch(self, of: str, layer: int, activations: Activations) -> None:
        for number, tensor in enumerate(activations.onward[of, layer]):
            if (of, layer, number) not in self._watched:
                self._watched.add((of, layer, number))
                _keep(tensor, (of, layer, number), self._above)

    def sums(self) -> dict[str, Tensor]:
        """By term: the dot product of its gradient and that from above, and the square of either, [3], float64; after the
        backward pass, and as if that had been of the sum over positions. A term that matches several layers counts them as one
        long vector."""
        return {name: self._sums(gradients) for name, gradients in self._own.items()}

    def _sums(self, gradients: dict[Place, Tensor]) -> Tensor:
        scale = self._scale[0].float() if self._scale else torch.ones(())
        parts = [
            products(gradient / scale, self._above[at] / scale)
            for at, gradient in gradients.items()
            if at in self._above
        ]
        return torch.stack(parts).sum(0) if parts else torch.zeros(3, dtype=torch.float64)


def _keep(tensor: Tensor, place: Place, kept: dict[Place, Tensor]) -> Tensor:
    """The tensor, whose gradient will be kept."""

    def keep(gradient: Tensor) -> None:
        kept[place] = gradient.float()

    if tensor.requires_grad:
        tensor.register_hook(keep)
    return tensor


def products(first: Tensor, second: Tensor) -> Tensor:
    """Their dot product and the square of either, [3], float64."""
    first, second = first.flatten(), second.flatten()
    return torch.stack([torch.dot(first, second), torch.dot(first, first), torch.dot(second, second)]).double()
