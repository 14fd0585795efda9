"""Evaluation on the held-out split of a cache.

All metrics are over positions, and at temperature 1 whatever the training temperature is, so that runs compare.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from teachercache.config import ObjectiveConfig
from teachercache.objective import NO_TARGET, DistillationObjective
from teachercache.objective.projected import chunk_logits, chunk_rows
from teachercache.student.output_layer import loss_for_logits
from teachercache.targets import TargetKind
from teachercache.targets.kind import first_choices

# Both terms are measured: neither weight may be zero.
_BOTH = 0.5


class HeldOutMeasure:
    """Sums over the positions of some batches; add batches of every process, then `metrics` of the reduced sums."""

    def __init__(self, kind: TargetKind, *, tail: str, device: torch.device) -> None:
        config = ObjectiveConfig.model_validate({"alpha": _BOTH, "temperature": 1.0, "tail": tail})
        self._kind, self._vocabulary_size = kind, kind.vocabulary_size
        self._objective = DistillationObjective(config, kind=kind)
        self.columns = self._objective.columns
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)

    def add(self, model: Any, batches: Iterable[dict[str, Any]], *, in_layer_of: Any = None) -> None:
        """One forward pass for each batch. The model is called as it is given: under ZeRO 3 it gathers its weights.

        `in_layer_of` is the same model unwrapped, if `takes_loss` accepts it: then no logits of a whole batch are formed.
        """
        with torch.no_grad():
            for batch in batches:
                labels_BS, targets = batch.pop("shift_labels"), batch.pop("targets")
                if in_layer_of is None:
                    self._add(model(**batch, use_cache=False).logits, labels_BS, targets)
                    continue
                with loss_for_logits(in_layer_of, partial(self._add_hidden, labels_BS, targets)):
                    model(**batch, use_cache=False)

    def _add_hidden(
        self,
        labels_BS: Tensor,
        targets: dict[str, Tensor],
        hidden_BSD: Tensor,
        weight_LD: Tensor,
        bias_L: Tensor | None,
        softcap: float | None,
    ) -> Tensor:
        is_position_BS = labels_BS != NO_TARGET
        hidden_ND, labels_N = hidden_BSD[is_position_BS], labels_BS[is_position_BS]
        rows = chunk_rows(weight_LD)
        for start in range(0, len(hidden_ND), rows):
            part = slice(start, start + rows)
            logits_CL = chunk_logits(hidden_ND[part], weight_LD, bias_L, softcap)
            self._add(logits_CL[None], labels_N[None, part], {name: values[part] for name, values in targets.items()})
        return hidden_BSD.new_zeros(())

    def _add(self, logits_BSL: Tensor, labels_BS: Tensor, targets: dict[str, Tensor]) -> None:
        terms = self._objective(logits_BSL, labels_BS, targets)
        is_position_BS = labels_BS != NO_TARGET
        choice_N = logits_BSL[..., : self._vocabulary_size].argmax(-1)[is_position_BS]
        correct = (choice_N == labels_BS[is_position_BS]).sum()
        agreeing = (choice_N == first_choices(self._kind, targets, xp=torch).to(choice_N)).sum()
        positions = torch.tensor(terms.positions, device=self.sums.device)
        self.sums += torch.stack([item.double() for item in (terms.ce, terms.divergence, correct, agreeing, positions)])

    @staticmethod
    def metrics(sums: Tensor, *, prefix: str) -> dict[str, float]:
        """`loss` (CE, nats per position), `perplexity`, `kl` (to the teacher), `accuracy`, `top1_agreement`."""
        ce, kl, correct, agreeing, positions = sums.tolist()
        values = {
            "loss": ce / positions,
            "perplexity": math.exp(min(ce / positions, 700.0)),
            "kl": kl / positions,
            "accuracy": correct / positions,
            "top1_agreement": agreeing / positions,
        }
        return {f"{prefix}_{name}": value for name, value in values.items()}
