"""A pass over the held-out rows of all caches of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from teachercache.objective.logits.student_output import StudentOutput
from teachercache.stream.dataset import Rows
from teachercache.training.supervision.held_out import Measure
from teachercache.training.supervision.reading import Reading
from teachercache.training.trainer.output_layer import output_with_loss


class HeldOutPass:
    """Measures a student on what a run reads; this process's share of the rows, summed over processes."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._loader: DataLoader[Rows] | None = None

    def metrics(
        self, model: Any, *, in_layer_of: Any, prepare: Callable[[Any], Any], accelerator: Any, prefix: str
    ) -> dict[str, float]:
        """Over all held-out rows; where there are several caches, of each besides: `eval_cache0_loss`, …

        `in_layer_of` as in `output_with_loss`; `prepare` brings a batch to the model's device.
        """
        supervision, device = self._reading.supervision, self._reading.args.device
        measures = [supervision.measure(number, device) for number in range(len(supervision.caches))]
        if self._loader is None:
            self._loader = self._reading.held_out([measure.columns for measure in measures])
        for batch in self._loader:
            add_batch(measures[batch.pop("source")], model, prepare(batch), in_layer_of=in_layer_of)
        return self._reduced(measures, accelerator, prefix=prefix)

    def close(self) -> None:
        """End the loader's workers now: one that is left to garbage collection takes 5 s to end."""
        self._loader = None

    def _reduced(self, measures: Sequence[Measure], accelerator: Any, *, prefix: str) -> dict[str, float]:
        sums = [accelerator.reduce(measure.sums, "sum") for measure in measures]
        metrics = measures[0].metrics(sum(sums[1:], sums[0]), prefix=prefix)
        if len(sums) > 1:
            for number, of_cache in enumerate(sums):
                if self._reading.supervision.caches[number].rows_of("held-out"):
                    metrics |= measures[0].metrics(of_cache, prefix=f"{prefix}_cache{number}")
        return metrics


def add_batch(measure: Measure, model: Any, batch: dict[str, Any], *, in_layer_of: Any = None) -> None:
    """One forward pass of a batch of the collator's, on the model's device; `in_layer_of` as in `output_with_loss`."""
    labels_BS, targets = batch.pop("shift_labels"), batch.pop("targets")

    def add(output: StudentOutput) -> Tensor:
        measure.add(output, labels_BS, targets)
        return output.values_BSA.new_zeros(())

    with torch.no_grad():
        output_with_loss(model, batch, add, in_layer_of=in_layer_of)
