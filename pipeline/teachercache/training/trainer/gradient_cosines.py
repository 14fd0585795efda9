"""Cosines between the gradients of the loss's terms, with respect to activations that they share: do the terms agree?

    cosine_kl_ce        divergence (as the log calls it; `across` for the terms across tokenizers) and cross-entropy, at what
                        enters the output layer (at the logits, for students whose loss is formed outside of it): two more
                        passes over the output layer, each with one of the terms alone
    cosine_TERM_above   a term between layers, and all that pulls the same activations from above: see `gradient_taps`;
                        no pass more than training makes
    gradient_…          their lengths, the root mean square over positions, with the weights that terms have in the loss

Below 0 what one term gains the other loses: a conflict in the sense of Yu et al., "Gradient Surgery for Multi-Task Learning",
2020, who compare gradients of parameters. Those of activations decide them, cost no backward pass of their own, and are
whole in each process, whatever shards the parameters. Dot products and squares are added up over micro-batches and processes,
so that a cosine is that of the global batch, over the positions that were measured in a logging window. With `routing`
gradients are those of distillation's pass: from above comes nothing of the task.

Shapes: B rows, S tokens, N positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from teachercache.config import ObjectiveConfig
from teachercache.objective import NO_TARGET, LossTerms
from teachercache.objective.layers.gradient_taps import GradientTaps, products
from teachercache.objective.layers.objective import LayerObjective
from teachercache.objective.logits.operands import Weights
from teachercache.objective.logits.student_output import StudentOutput

ABOVE = "above"
TERMS = "across"  # what the log calls a divergence that is made of several terms


def cosines_of(
    config: ObjectiveConfig, accelerator: Any, *, layers: Sequence[LayerObjective], divergence_name: str | None
) -> GradientCosines | None:
    """Returns the cosines of a recipe that asks for them."""
    if config.gradient_cosines is None:
        return None
    terms = layers[0].names if layers else ()
    return GradientCosines(accelerator, every=config.gradient_cosines, first=divergence_name or TERMS, terms=terms)


class GradientCosines:
    """Measured at every `every`-th optimizer step, summed over a logging window. `first` is what the log calls the divergence,
    `terms` are the names of those between layers."""

    def __init__(self, accelerator: Any, *, every: int, first: str, terms: Sequence[str]) -> None:
        self._accelerator, self._every = accelerator, every
        self._pairs = ((first, "ce"), *((name, f"{ABOVE}_{name}") for name in terms))
        self._sums = torch.zeros(len(self._pairs), 4, dtype=torch.float64, device=accelerator.device)
        # Of the last micro-batch, whose backward pass comes after it.
        self._open: tuple[GradientTaps, Tensor] | None = None

    def taps_at(self, step: int, shift_labels_BS: Tensor) -> GradientTaps | None:
        """Returns the taps for a micro-batch's gradients in a step, counted from 0; None where it is not measured."""
        self._settle()
        if (step + 1) % self._every:
            return None
        self._open = (GradientTaps(), (shift_labels_BS != NO_TARGET).sum())
        return self._open[0]

    def add(self, loss: Callable[[StudentOutput, Weights], LossTerms], output: StudentOutput, weights: Weights) -> None:
        """Both terms of a micro-batch, at the values that the student's output holds."""
        if weights.alpha in (0, 1):
            return
        gradients = []
        for alpha, share in ((1.0, weights.alpha), (0.0, 1 - weights.alpha)):
            leaf = output.detached()
            with torch.enable_grad():
                terms = loss(leaf, replace(weights, alpha=alpha))
            [gradient] = torch.autograd.grad(terms.total, leaf.values_BSA)
            gradients.append(gradient.float() * share)
        self._add(0, products(*gradients), terms.positions)

    def _settle(self) -> None:
        if self._open is not None:
            (taps, positions), self._open = self._open, None
            for place, (first, _) in enumerate(self._pairs):
                if first in taps.sums():
                    self._add(place, taps.sums()[first], positions)

    def _add(self, place: int, sums: Tensor, positions: Tensor | int) -> None:
        # Where a loss scale has overflowed there are no gradients, and no optimizer step either.
        sums = torch.where(sums.isfinite().all(), sums, 0.0).to(self._sums)
        self._sums[place] += torch.cat([sums, torch.as_tensor(positions).to(sums).view(1)])

    def take(self) -> dict[str, float]:
        """Figures of a window over all processes; none where nothing was measured in it. A collective."""
        self._settle()
        reduced = self._accelerator.reduce(self._sums, "sum").tolist()
        self._sums = torch.zeros_like(self._sums)
        figures: dict[str, float] = {}
        for (first, second), (dot, first_square, second_square, positions) in zip(self._pairs, reduced, strict=True):
            if positions and first_square and second_square:
                name = f"{first}_{ABOVE}" if second.startswith(ABOVE) else f"{first}_{second}"
                figures[f"cosine_{name}"] = dot / math.sqrt(first_square * second_square)
                for which, square in ((first, first_square), (second, second_square)):
                    figures[f"gradient_{which}"] = math.sqrt(square / positions)
        return figures
