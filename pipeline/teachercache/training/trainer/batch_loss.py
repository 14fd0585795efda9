"""The loss of one micro-batch: its logits' by the objective of its cache, that of layers, and what is measured beside them.

Shapes: B rows, S tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

from teachercache.objective import LossTerms
from teachercache.objective.logits.operands import Weights
from teachercache.objective.logits.student_output import StudentOutput
from teachercache.training.trainer.gradient_cosines import GradientCosines
from teachercache.training.trainer.layers import check_formed_outside, logged, watched
from teachercache.training.trainer.objectives import Objectives
from teachercache.training.trainer.output_layer import output_with_loss, takes_loss
from teachercache.training.trainer.routing import Routing

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class BatchLoss:
    """Forms the loss of a student; `replicated` says that one process drives several GPUs."""

    student: Any
    objectives: Objectives
    routing: Routing | None
    cosines: GradientCosines | None
    replicated: bool = False
    warns: bool = True
    in_layer: bool | None = field(default=None)  # whether the loss is formed in the output layer; None: not tried yet

    def of(self, model: Any, inputs: dict[str, Any], weights: Weights, *, step: int) -> tuple[LossTerms, Any]:
        """Sums over its positions, with the student's outputs. `model` is the student as training wraps it, `inputs` what the
        collator gave, on its device; `weights` hold in step number `step`."""
        source, layers = inputs.pop("source"), inputs.pop("layers", None)
        labels_BS, targets = inputs.pop("shift_labels"), inputs.pop("targets")
        is_task = self.routing is not None and not self.routing.learns_from_teacher
        matched = self.objectives.of_layers[source] if self.objectives.of_layers and not is_task else None
        taps = None if self.cosines is None or is_task else self.cosines.taps_at(step, labels_BS)
        in_layer_of = self.student if self.forms_in_layer(model) else None
        formed: list[LossTerms] = []
        if in_layer_of is None:
            check_formed_outside(model, matched)

        def of_output(output: StudentOutput, weights: Weights) -> LossTerms:
            position_ids_BS = inputs.get("position_ids")
            terms: LossTerms = self.objectives.of_logits[source](
                output, labels_BS, targets, weights=weights, position_ids_BS=position_ids_BS
            )
            return terms

        def form(output: StudentOutput) -> Tensor:
            if self.cosines is not None and taps is not None:
                self.cosines.add(of_output, output, weights)
            terms = self._of_pass(partial(of_output, output), weights)
            for objective in self.objectives.of_layers:  # in one order in all processes, whatever caches they are at
                if objective is matched:
                    of_layers = objective.loss(activations, layers, labels_BS, weights=weights.terms, taps=taps)
                    terms = replace(
                        terms, total=terms.total + of_layers.total, named={**terms.named, **logged(of_layers)}
                    )
                else:
                    terms = replace(terms, total=terms.total + objective.zero_contribution(terms.total))
            if taps is not None:
                taps.scaled_by(terms.total)
            formed.append(terms)
            return terms.total

        with watched(self.student, matched, apart=taps is not None) as activations:
            total, outputs = output_with_loss(model, inputs, form, in_layer_of=in_layer_of)
        return replace(formed[-1], total=total), outputs

    def _of_pass(self, terms_of: Callable[[Weights], LossTerms], weights: Weights) -> LossTerms:
        """The sums of a batch, or of one pass of gradient routing over it."""
        if self.routing is None:
            return terms_of(weights)
        return self.routing.of_pass(terms_of(self.routing.weights(weights)), weights)

    def forms_in_layer(self, model: Any) -> bool:
        """Tells whether the loss can be formed where logits would be. Found out at the first batch, by all processes at
        once."""
        if self.in_layer is None:
            # Replicas of `nn.DataParallel` would share one patched layer.
            self.in_layer = not self.replicated and takes_loss(self.student, model)
            if not self.in_layer and self.warns:
                name = type(self.student).__name__
                logger.warning("%s: logits of whole batches are formed, its output layer is not plain", name)
        return self.in_layer
