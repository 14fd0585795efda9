"""The loss of one micro-batch: its logits' by the objective of its cache, that of layers, and what is measured beside them.

Shapes: B rows, S tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from teachercache.objective import DistillationObjective, LossTerms
from teachercache.objective.cross_tokenizer.objective import CrossTokenizerObjective
from teachercache.objective.layers.objective import LayerObjective
from teachercache.objective.logits.operands import Weights
from teachercache.training.trainer.gradient_cosines import GradientCosines
from teachercache.training.trainer.layers import check_formed_outside, logged, watched
from teachercache.training.trainer.output_layer import loss_for_logits, takes_loss
from teachercache.training.trainer.routing import Routing

logger = logging.getLogger(__name__)

OfLogits = Callable[..., LossTerms]  # (weights, the student's logits, or what enters its output layer and that layer)


@dataclass(eq=False)
class BatchLoss:
    """Of a student. `objectives` and `layer_objectives` (none, or as many) are those of each cache; `replicated` says that one
    process drives several GPUs."""

    student: Any
    objectives: Sequence[DistillationObjective | CrossTokenizerObjective]
    layer_objectives: Sequence[LayerObjective]
    routing: Routing | None
    cosines: GradientCosines | None
    replicated: bool = False
    warns: bool = True
    in_layer: bool | None = field(default=None)  # whether the loss is formed in the output layer; None: not tried yet

    def of(self, model: Any, inputs: dict[str, Any], weights: Weights, *, step: int) -> tuple[LossTerms, Any]:
        """Sums over its positions, with the student's outputs. `model` is the student as training wraps it, `inputs` what the
        collator gave, on its device; `weights` hold in step number `step`."""
        objective = self.objectives[source := inputs.pop("source")]
        layers, labels_BS, targets = inputs.pop("layers", None), inputs.pop("shift_labels"), inputs.pop("targets")
        rows: Any = {"position_ids_BS": inputs.get("position_ids")} if objective.config.emphasis else {}
        is_task = self.routing is not None and not self.routing.learns_from_teacher
        matched = self.layer_objectives[source] if self.layer_objectives and not is_task else None
        taps = None if self.cosines is None or is_task else self.cosines.taps_at(step, labels_BS)
        in_layer, formed = self.forms_in_layer(model), []
        with watched(self.student, matched, apart=taps is not None) as activations:

            def form(of_logits: OfLogits, *operands: Any) -> Tensor:
                if self.cosines is not None and taps is not None:
                    self.cosines.add(of_logits, operands, weights)
                terms = self._of_logits(of_logits, operands, weights)
                for each in self.layer_objectives:  # in one order in all processes, whatever caches they are at
                    if each is matched:
                        found = each.loss(activations, layers, labels_BS, weights=weights.terms, taps=taps)
                        terms = replace(terms, total=terms.total + found.total, named={**terms.named, **logged(found)})
                    else:
                        terms = replace(terms, total=terms.total + each.zero_contribution(terms.total))
                if taps is not None:
                    taps.scaled_by(terms.total)
                formed.append(terms)
                return terms.total

            def in_output_layer(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
                def projected(w: Weights, *operands: Any) -> LossTerms:
                    return objective.projected(*operands, labels_BS, targets, softcap=softcap, weights=w, **rows)

                return form(projected, hidden, weight, bias)

            if not in_layer:
                check_formed_outside(model, matched)
                outputs = model(**inputs, use_cache=False)
                form(lambda w, logits: objective(logits, labels_BS, targets, weights=w, **rows), outputs.logits)
                return formed[-1], outputs
            with loss_for_logits(self.student, in_output_layer):
                outputs = model(**inputs, use_cache=False)
        return replace(formed[-1], total=outputs.logits.reshape(())), outputs

    def _of_logits(self, of_logits: OfLogits, operands: Sequence[Any], weights: Weights) -> LossTerms:
        if self.routing is None:
            return of_logits(weights, *operands)
        return self.routing.of_pass(of_logits(self.routing.weights(weights), *operands), weights)

    def forms_in_layer(self, model: Any) -> bool:
        """Whether the loss can be formed where logits would be. Found out at the first batch, by all processes at once."""
        if self.in_layer is None:
            # Replicas of `nn.DataParallel` would share one patched layer.
            self.in_layer = not self.replicated and takes_loss(self.student, model)
            if not self.in_layer and self.warns:
                name = type(self.student).__name__
                logger.warning("%s: logits of whole batches are formed, its output layer is not plain", name)
        return self.in_layer
