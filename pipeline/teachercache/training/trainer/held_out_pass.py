"""A pass over the held-out rows of all caches of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import DataLoader

from teachercache.stream.dataset import Rows
from teachercache.training.supervision.reading import Reading
from teachercache.training.trainer.held_out import AcrossMeasure, HeldOutMeasure, Measure
from teachercache.training.trainer.held_out_ensemble import TaughtMeasure


class HeldOutPass:
    """Measures a student on what a run reads; this process's share of the rows, summed over processes."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._loader: DataLoader[Rows] | None = None

    def metrics(
        self, model: Any, *, in_layer_of: Any, prepare: Callable[[Any], Any], accelerator: Any, prefix: str
    ) -> dict[str, float]:
        """Over all held-out rows; where there are several caches, of each besides: `eval_cache0_loss`, …

        `in_layer_of` as in `Measure.add`; `prepare` brings a batch to the model's device.
        """
        measures = [self._measure(number) for number in range(len(self._reading.caches))]
        if self._loader is None:
            self._loader = self._reading.held_out([measure.columns for measure in measures])
        for batch in self._loader:
            measures[batch.pop("source")].add(model, [prepare(batch)], in_layer_of=in_layer_of)
        return self._reduced(measures, accelerator, prefix=prefix)

    def close(self) -> None:
        """End the loader's workers now: one that is left to garbage collection takes 5 s to end."""
        self._loader = None

    def _measure(self, number: int) -> Measure:
        """Of the rows of one cache."""
        reading, device = self._reading, self._reading.args.device
        cache, tail = reading.caches[number], reading.objective.tail
        if reading.alignments:
            return AcrossMeasure(cache, reading.alignments[number], tail=tail, device=device)
        if reading.teachers is not None and reading.teachers.shared.adapts:
            fused = reading.teachers.fused(number, reading.objective)
            return TaughtMeasure(cache.kind, tail=tail, device=device, teacher=fused)
        return HeldOutMeasure(cache.kind, tail=tail, device=device)

    def _reduced(self, measures: Sequence[Measure], accelerator: Any, *, prefix: str) -> dict[str, float]:
        sums = [accelerator.reduce(measure.sums, "sum") for measure in measures]
        metrics = measures[0].metrics(sum(sums[1:], sums[0]), prefix=prefix)
        if len(sums) > 1:
            for number, of_cache in enumerate(sums):
                if self._reading.caches[number].rows_of("held-out"):
                    metrics |= measures[0].metrics(of_cache, prefix=f"{prefix}_cache{number}")
        return metrics
