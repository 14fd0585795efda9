"""The teacher: one model, its forward pass over rows, and the target columns of their positions.

What runs the model is a backend (backend.py); everything from its hidden states on is here, the same for each of them.
Memory stays bounded: the model runs over a batch, and the output projection over blocks of positions whose logits fit a
processor's cache, right before they are reduced to columns. Padding and positions without a target are never projected.

    B rows, S tokens, N positions, D hidden width, V vocabulary
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teachercache.config import TeacherConfig
from teachercache.errors import ModelError
from teachercache.models.memory import NoMemory, first_line, free_memory, is_out_of_memory
from teachercache.targets import CalibratedKind, StoredTargets, TargetKind, calibrates
from teachercache.targets.coding.counter_rng import position_seeds
from teachercache.targets.layers.kind import RowActivations
from teachercache.targets.layers.layer_file import LayerFile
from teachercache.tasks.contract import Task
from teachercache.tasks.next_token import NEXT_TOKEN
from teachercache.teacher.backend import ForwardPass, TeacherBackend
from teachercache.teacher.backends import backend_named
from teachercache.teacher.batches import length_sorted_batches
from teachercache.teacher.calibration import calibrate
from teachercache.teacher.fidelity import Drift
from teachercache.teacher.layers import LayerSample, make_layer_files
from teachercache.teacher.output_layer import OutputLayer
from teachercache.teacher.transformers_backend import TransformersBackend
from teachercache.tokens.rows import TokenRow

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A matmul wants many rows. What reduces its result wants few: as many as stay in a core's own cache.
PROJECTED_BYTES = {"cpu": 48 * 2**20, "cuda": 400 * 2**20}
MORE_ATTEMPTS = 2  # of a row that ran out of memory alone
REDUCED_BYTES = {"cpu": 3 * 2**19, "cuda": 400 * 2**20}


@dataclass(frozen=True, eq=False)
class Captured:
    """A row with its columns ([positions, …] each), or with the reason why it has none."""

    row: TokenRow
    columns: dict[str, NDArray[Any]] | None
    problem: str | None = None


class Teacher:
    """A loaded teacher on one device: a backend that runs it, and what is captured of it.

    `longest` is the number of tokens in the longest row, as far as it is known. Raises `ModelError` for a model that cannot
    run such rows.
    """

    def __init__(
        self,
        backend: TeacherBackend,
        *,
        targets: StoredTargets,
        layout: str,
        pad_id: int,
        longest: int = 0,
        task: Task = NEXT_TOKEN,
    ) -> None:
        self.backend, self.targets, self.task = backend, targets, task
        kind = targets.logits
        backend.prepare(task=task, layout=layout, pad_id=pad_id, vocabulary_size=kind.vocabulary_size, longest=longest)
        self.batches_halved = 0
        # Called with the rows of each forward pass before it; with none by whoever says that passes are over.
        self.on_batch: Callable[[Sequence[TokenRow]], None] = lambda rows: None
        self.drift = Drift(kind)

    @property
    def device(self) -> torch.device:
        """Device of its model."""
        return self.backend.device

    @property
    def kind(self) -> TargetKind:
        """Kind of its logit targets."""
        return self.targets.logits

    @classmethod
    def load(
        cls,
        config: TeacherConfig,
        *,
        targets: StoredTargets,
        layout: str,
        pad_id: int,
        longest: int = 0,
        device: str = "cpu",
    ) -> Teacher:
        """Load the model that a recipe names, by the backend that it names. Raises `ModelError`."""
        backend = backend_named(config.backend).load(config, device=device)
        return cls(backend, targets=targets, layout=layout, pad_id=pad_id, longest=longest)

    @classmethod
    def of(cls, model: Any, *, device: str = "cpu", **settings: Any) -> Teacher:
        """A teacher that is a model of transformers, loaded by the caller; `settings` are those of `Teacher`."""
        return cls(TransformersBackend(model, device=device), **settings)

    def describe(self) -> dict[str, Any]:
        """Describes the loaded model for the manifest, and what it runs with."""
        return {**self.backend.describe(), "backend": self.backend.name}

    def capture(self, rows: Sequence[TokenRow], *, positions_per_batch: int) -> list[Captured]:
        """Targets of all rows, in their order. Rows whose logits are not numbers come back with a problem."""
        captured = self._of_each(self._forward, rows, positions_per_batch=positions_per_batch)
        return [
            _too_long(row, result.said) if isinstance(result, NoMemory) else result
            for row, result in zip(rows, captured, strict=True)
        ]

    def capture_layers(self, rows: Sequence[TokenRow], *, positions_per_batch: int) -> list[Captured]:
        """Columns of the layers alone, of all rows in their order: nothing is projected. Rows whose layers hold no numbers come
        back with a problem."""
        captured = self._of_each(self._layers_alone, rows, positions_per_batch=positions_per_batch)
        return [
            _too_long(row, result.said) if isinstance(result, NoMemory) else result
            for row, result in zip(rows, captured, strict=True)
        ]

    @torch.inference_mode()
    def _layers_alone(self, rows: list[TokenRow]) -> list[Captured]:
        layers, attention = self.targets.hidden_layers, self.targets.attention_layers
        passed = self.backend.hidden(rows, layers=layers, attention=attention)
        return self._with_layers([Captured(row, {}) for row in rows], passed.activations)

    def label_nats(self, rows: Sequence[TokenRow], *, positions_per_batch: int) -> list[NDArray[np.float64] | None]:
        """-log p of each row's labels at T = 1, [positions], in the order of rows; None for a row that does not fit into
        memory, at the third attempt either."""
        found = self._of_each(self._nats, rows, positions_per_batch=positions_per_batch)
        return [None if isinstance(nats_N, NoMemory) else nats_N for nats_N in found]

    @torch.inference_mode()
    def _nats(self, rows: list[TokenRow]) -> list[NDArray[np.float64]]:
        labels_N, parts = self._labels(rows), []
        for start, logits_nV, _ in self._logit_blocks(self.backend.hidden(rows)):
            log_probs_nV = logits_nV[:, : self.kind.vocabulary_size].log_softmax(-1)
            labels_n1 = labels_N[start : start + len(logits_nV), None]
            parts.append(-log_probs_nV.gather(1, labels_n1)[:, 0].double().cpu().numpy())
        return np.split(np.concatenate(parts), np.cumsum([row.positions for row in rows])[:-1])

    def prepare(self, rows: Sequence[TokenRow], *, positions_per_batch: int, longest: int) -> dict[str, LayerFile]:
        """Make what the targets are read by, from a sample of rows: the basis of logits, which `targets.logits` has then,
        and the layer files by section, which are returned as well. From here on this teacher captures with them.

        `longest` is the number of tokens in the longest row. Raises `ModelError` when logits or attention of this model cannot
        be rebuilt, or the sample is too small.
        """
        layer = self.backend.output_layer() if calibrates(self.kind) else None
        sample = LayerSample(self.targets) if self.targets.needs_layer_file else None
        hidden = self._of_each(partial(self._hidden, sample=sample), rows, positions_per_batch=positions_per_batch)
        if layer is not None:
            self.targets = self.targets.with_logits(self._calibrated(layer, hidden))
            self.drift = Drift(self.kind)
        made = (
            {}
            if sample is None
            else make_layer_files(self.backend.attention_file, self.targets, sample, longest=longest)
        )
        for section, layers in made.items():
            self.targets = self.targets.with_layer_file(section, layers, longest=longest)
        return made

    def _calibrated(self, layer: OutputLayer, hidden: Sequence[Any]) -> CalibratedKind:
        # Capture quarantines the others.
        usable = [
            values_ND
            for values_ND in hidden
            if not isinstance(values_ND, NoMemory) and bool(values_ND.isfinite().all())
        ]
        if not usable:
            raise ModelError(
                "no row is left to calibrate the sketch on: every document is held out, quarantined or gives no numbers; "
                "lower corpus.held_out, or use targets.logits.kind: top-k"
            )
        return self._fit(layer, usable)

    def _fit(self, layer: OutputLayer, rows_hidden_ND: list[Any]) -> CalibratedKind:
        """On this device, or on the CPU where there is no room beside the model."""
        assert calibrates(self.kind)
        try:
            return calibrate(self.kind, layer, rows_hidden_ND)
        except RuntimeError as error:
            if self.device.type == "cpu" or not is_out_of_memory(error):
                raise
            said = first_line(error)
        free_memory()
        logger.warning("no room to fit the sketch beside the model (%s): fitted on the CPU, which takes minutes", said)
        return calibrate(self.kind, layer.on("cpu"), [hidden_ND.cpu() for hidden_ND in rows_hidden_ND])

    @torch.inference_mode()
    def _hidden(self, rows: list[TokenRow], *, sample: LayerSample | None) -> Sequence[Any]:
        """Returns what enters the output layer at the positions of each row, [N, D]; the sample takes of layers what it
        wants."""
        layers = [] if sample is None else sample.hidden_layers
        passed = self.backend.hidden(rows, layers=layers, attention=self.targets.attention_layers)
        if sample is not None:
            sample.add(passed.activations)
        if passed.hidden_ND is None:
            return [None] * len(rows)
        split: Sequence[Any] = passed.hidden_ND.split([row.positions for row in rows])
        return split

    def _of_each(
        self, run: Callable[[list[TokenRow]], Sequence[T]], rows: Sequence[TokenRow], *, positions_per_batch: int
    ) -> list[T | NoMemory]:
        """Runs `run` on all rows; gives `NoMemory` for a row that does not fit into memory alone.

        Memory may have been short for a moment, by another process on the same device: such a row is tried again after all
        others, and once more at the very end.
        """
        made: list[T | NoMemory] = [NoMemory("")] * len(rows)
        batches = length_sorted_batches(rows, positions_per_batch=positions_per_batch)
        for _ in range(1 + MORE_ATTEMPTS):
            for batch in batches:
                for index, result in zip(batch, self._halving(run, [rows[i] for i in batch]), strict=True):
                    made[index] = result
            batches = [[index] for index, result in enumerate(made) if isinstance(result, NoMemory)]
        return made

    def _halving(self, run: Callable[[list[TokenRow]], Sequence[T]], rows: list[TokenRow]) -> list[T | NoMemory]:
        """Runs `run` on a batch; one that runs out of memory is halved. Gives `NoMemory` for a row too long alone."""
        self.on_batch(rows)
        try:
            return list(run(rows))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            said = first_line(error)
        # Outside the handler: the exception's frames hold the tensors that did not fit.
        free_memory()
        if len(rows) == 1:
            return [NoMemory(said)]
        self.batches_halved += 1
        logger.warning(
            "a batch of %d rows ran out of memory (%s): halved; lower precompute.positions_per_batch", len(rows), said
        )
        middle = len(rows) // 2
        return self._halving(run, rows[:middle]) + self._halving(run, rows[middle:])

    @torch.inference_mode()
    def _forward(self, rows: list[TokenRow]) -> list[Captured]:
        labels_N = self._labels(rows)
        seeds_N = np.concatenate([position_seeds(row.row_id, row.positions) for row in rows])
        parts = []
        layers, attention = self.targets.hidden_layers, self.targets.attention_layers
        passed = self.backend.hidden(rows, layers=layers, attention=attention)
        for start, logits_nV, hidden_nD in self._logit_blocks(passed):
            self.drift.sample(start, logits_nV)
            size = self._rows_within(REDUCED_BYTES, logits_nV.shape[1])
            for offset in range(0, len(logits_nV), size):
                part = slice(offset, offset + size)
                whole = slice(start + offset, start + min(offset + size, len(logits_nV)))
                hidden = None if hidden_nD is None else hidden_nD[part]
                parts.append(self.targets.capture(torch, logits_nV[part], labels_N[whole], hidden, seeds_N[whole]))
        captured = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        ends = np.cumsum([row.positions for row in rows])[:-1]
        split = {name: np.split(values, ends) for name, values in captured.items()}
        finished = [self._finish(row, {name: split[name][i] for name in split}) for i, row in enumerate(rows)]
        self.drift.measure([item.columns for item in finished], [row.positions for row in rows])
        return self._with_layers(finished, passed.activations)

    def _with_layers(self, finished: list[Captured], activations: Sequence[RowActivations]) -> list[Captured]:
        """The rows with the columns of their layers; one whose layers hold no numbers has none at all."""
        if not self.targets.layers:
            return finished
        return [self._with_layer_columns(item, row) for item, row in zip(finished, activations, strict=True)]

    def _with_layer_columns(self, item: Captured, activations: RowActivations) -> Captured:
        if item.columns is None:
            return item
        columns = dict(item.columns)
        try:
            for kind in self.targets.layers:
                columns |= kind.capture(torch, activations)
        except ValueError as error:
            return Captured(item.row, None, str(error))
        return Captured(item.row, columns)

    def _labels(self, rows: Sequence[TokenRow]) -> Tensor:
        """Labels of all positions, [N]."""
        labels = np.concatenate([self.task.labels_N(row) for row in rows])
        return torch.from_numpy(labels.astype(np.int64)).to(self.device)

    def _logit_blocks(self, passed: ForwardPass) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """(start, float32 logits [n, V], input of the output layer [n, D]) over the positions, block by block.

        Each block of logits is the caller's to overwrite.
        """
        own, hidden_ND = passed.logits, passed.hidden_ND
        if own is None:
            assert hidden_ND is not None
            layer = self.backend.output_layer()
            block = self._rows_within(PROJECTED_BYTES, len(layer.matrix_VD))
            for start in range(0, len(hidden_ND), block):
                hidden_nD = hidden_ND[start : start + block]
                yield start, layer.logits(hidden_nD), hidden_nD
            return
        block = self._rows_within(PROJECTED_BYTES, own.width)
        for start in range(0, len(own.index_N), block):
            part = slice(start, start + block)
            yield start, own.block(part), None if hidden_ND is None else hidden_ND[part]

    def _rows_within(self, budget: dict[str, int], width: int) -> int:
        return max(1, budget[self.device.type] // (4 * width))

    def _finish(self, row: TokenRow, captured: dict[str, NDArray[Any]]) -> Captured:
        unusable = int((~self.targets.is_usable(captured)).sum())
        if unusable:
            return Captured(
                row, None, f"the teacher's logits are not finite at {unusable} of {row.positions} positions"
            )
        return Captured(row, self.targets.finish(captured))


def _too_long(row: TokenRow, said: str) -> Captured:
    return Captured(row, None, f"out of memory with this row of {row.length} tokens alone ({said})")
