"""The losses of a run: those of logits, one for each cache, and those between layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from teachercache.objective import Objective
from teachercache.objective.layers.objective import LayerObjective
from teachercache.objective.objective_schedule import ScheduleRange
from teachercache.objective.token_weighting.weights import EFFECTIVE
from teachercache.training.supervision.contract import Columns, Supervision
from teachercache.training.trainer.layers import layer_objectives, names_logged

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Objectives:
    """The objective of each cache; `of_layers` as many, or none."""

    of_logits: Sequence[Objective]
    of_layers: Sequence[LayerObjective]

    @classmethod
    def of(
        cls, model: PreTrainedModel, supervision: Supervision, schedule_range: ScheduleRange, *, seed: int
    ) -> Objectives:
        """Makes the objectives of a run. Adapters between layers become a part of the model; `seed` decides what they
        begin with.

        Raises `CacheError` where caches do not hold what is asked for, `ModelError` for a student whose layers cannot be
        recorded.
        """
        numbers = range(len(supervision.caches))
        of_logits = [supervision.objective(number, schedule_range) for number in numbers]
        of_layers = layer_objectives(model, supervision.config, supervision.caches, seed=seed)
        objectives = cls(of_logits, of_layers)
        supervision.check_columns(objectives.columns)
        return objectives

    @property
    def columns(self) -> Columns:
        """Columns that are read of each cache."""
        columns = [objective.columns for objective in self.of_logits]
        if not self.of_layers:
            return columns
        return [(*names, *layers.columns) for names, layers in zip(columns, self.of_layers, strict=True)]

    @property
    def names(self) -> tuple[str, ...]:
        """Names that are logged beside divergence and cross-entropy, the same in every process."""
        of_logits = [name for objective in self.of_logits for name in objective.names]
        emphasis = (EFFECTIVE,) if any(objective.config.emphasis is not None for objective in self.of_logits) else ()
        return (*dict.fromkeys(of_logits), *names_logged(self.of_layers), *emphasis)
