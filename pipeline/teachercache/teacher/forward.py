"""The teacher: one model, its forward pass over rows, and the target columns of their positions.

Memory stays bounded: the transformer body runs over a batch, and the output projection over blocks of positions whose
logits fit a processor's cache, right before they are reduced to columns. Padding and positions without a target are never
projected. A probe at loading tells whether logits are what the output layer, with its scale and soft cap, makes of the
body's output; models with more in between (an encoder's prediction head) run whole.

    B rows, S tokens, N positions, D hidden width, V vocabulary
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from teachercache.config import TeacherConfig
from teachercache.errors import ModelError
from teachercache.models.activations import Activations, check_recorded, recorded
from teachercache.models.loading import Layout, input_layout, load_causal_lm, model_inputs, target_places
from teachercache.models.memory import NoMemory, first_line, free_memory, is_out_of_memory
from teachercache.models.probes import check_length, check_rows_alone, check_sight, isolates_packed_segments
from teachercache.models.rotary import rotate_by_own_length
from teachercache.targets import CalibratedKind, StoredTargets, TargetKind, calibrates
from teachercache.targets.coding.counter_rng import position_seeds
from teachercache.targets.layers.kind import RowActivations
from teachercache.targets.layers.layer_file import LayerFile
from teachercache.tasks.contract import Task
from teachercache.tasks.next_token import NEXT_TOKEN
from teachercache.teacher.batches import length_sorted_batches
from teachercache.teacher.calibration import calibrate
from teachercache.teacher.fidelity import Drift
from teachercache.teacher.layers import LayerSample, make_layer_files, rows_of
from teachercache.teacher.output_layer import OutputLayer, layer_after_body, recorded_input
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
    """A loaded teacher on one device. `parameters`, `dtype` and `architecture` describe it for the manifest."""

    def __init__(
        self,
        model: Any,
        *,
        targets: StoredTargets,
        layout: str,
        pad_id: int,
        longest: int = 0,
        device: str = "cpu",
        task: Task = NEXT_TOKEN,
    ) -> None:
        self.targets, self.layout, self.pad_id, self.task = targets, layout, pad_id, task
        kind = targets.logits
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        _check_vocabulary(self.model, kind.vocabulary_size)
        check_length(self.model, name="the teacher", longest=longest)
        rotate_by_own_length(self.model)
        check_sight(self.model, task, name="the teacher", vocabulary_size=kind.vocabulary_size)
        check_rows_alone(self.model, vocabulary_size=kind.vocabulary_size, longest=longest)
        if layout == "packed" and not isolates_packed_segments(self.model, vocabulary_size=kind.vocabulary_size):
            raise ModelError(
                f"{type(model).__name__} does not keep the segments of a packed row apart; set `sequence.layout: documents`"
            )
        self._layer = layer_after_body(self.model, vocabulary_size=kind.vocabulary_size)
        self.batches_halved = 0
        # Called with the rows of each forward pass before it; with none by whoever says that passes are over.
        self.on_batch: Callable[[Sequence[TokenRow]], None] = lambda rows: None
        self.drift = Drift(kind)

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
        """Load the model that a recipe names; `longest` is the number of tokens in the longest row, as far as it is known.
        Raises `ModelError`."""
        model = load_causal_lm(
            config.model,
            revision=config.revision,
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
            attention=config.attention,
        )
        return cls(model, targets=targets, layout=layout, pad_id=pad_id, longest=longest, device=device)

    def describe(self) -> dict[str, Any]:
        """Describes the loaded model for the manifest, and what it runs with."""
        return {
            "architecture": type(self.model).__name__,
            "parameters": sum(weights.numel() for weights in self.model.parameters()),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "attention": getattr(self.model.config, "_attn_implementation", None),
            "libraries": {name: version(name) for name in ("torch", "transformers")},
        }

    def capture(self, rows: Sequence[TokenRow], *, positions_per_batch: int) -> list[Captured]:
        """Targets of all rows, in their order. Rows whose logits are not numbers come back with a problem."""
        captured = self._of_each(self._forward, rows, positions_per_batch=positions_per_batch)
        return [
            _too_long(row, result.said) if isinstance(result, NoMemory) else result
            for row, result in zip(rows, captured, strict=True)
        ]

    def label_nats(self, rows: Sequence[TokenRow], *, positions_per_batch: int) -> list[NDArray[np.float64] | None]:
        """-log p of each row's labels at T = 1, [positions], in the order of rows; None for a row that is too long."""
        found: list[NDArray[np.float64] | None] = [None] * len(rows)
        for batch in length_sorted_batches(rows, positions_per_batch=positions_per_batch):
            for index, nats_N in zip(batch, self._halving(self._nats, [rows[i] for i in batch]), strict=True):
                found[index] = None if isinstance(nats_N, NoMemory) else nats_N
        return found

    @torch.inference_mode()
    def _nats(self, rows: list[TokenRow]) -> list[NDArray[np.float64]]:
        inputs, index_N, labels_N = self._inputs(rows)
        parts = []
        for start, logits_nV, _ in self._logit_blocks(inputs, index_N):
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
        kind = self.kind
        layer = self._layer
        if layer is None and calibrates(kind):
            layer = OutputLayer.of(self.model, vocabulary_size=kind.vocabulary_size)
        sample = LayerSample(self.targets) if self.targets.needs_layer_file else None
        hidden = self._of_each(partial(self._hidden, sample=sample), rows, positions_per_batch=positions_per_batch)
        if calibrates(kind):
            assert layer is not None
            self.targets = self.targets.with_logits(self._calibrated(layer, hidden))
            self.drift = Drift(self.kind)
        made = {} if sample is None else make_layer_files(self.model, self.targets, sample, longest=longest)
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
        inputs, index_N, _ = self._inputs(rows)
        layers = [] if sample is None else sample.hidden_layers
        with (
            recorded(self.model, hidden=layers, attention=self.targets.attention_layers) as activations,
            recorded_input(self.model) as entered,
        ):
            if self._layer is not None:
                hidden_ND = self.model.base_model(**inputs, use_cache=False)[0].flatten(0, 1)[index_N]
            else:
                self.model(**inputs, use_cache=False)
                hidden_ND = entered[0].flatten(0, 1)[index_N]
        if sample is not None:
            check_recorded(activations, self.targets.attention_layers, self.model)
            sample.add(activations, rows, layout=self._layout_of(rows))
        return hidden_ND.split([row.positions for row in rows])

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
        inputs, index_N, labels_N = self._inputs(rows)
        seeds_N = np.concatenate([position_seeds(row.row_id, row.positions) for row in rows])
        parts = []
        layers, attention = self.targets.hidden_layers, self.targets.attention_layers
        with recorded(self.model, hidden=layers, attention=attention) as activations:
            for start, logits_nV, hidden_nD in self._logit_blocks(inputs, index_N):
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
        return self._with_layers(finished, activations)

    def _with_layers(self, finished: list[Captured], activations: Activations) -> list[Captured]:
        """The rows with the columns of their layers; one whose layers hold no numbers has none at all."""
        if not self.targets.layers:
            return finished
        rows = [item.row for item in finished]
        held = rows_of(activations, rows, layout=self._layout_of(rows))
        return [self._with_layer_columns(item, row) for item, row in zip(finished, held, strict=True)]

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

    def _layout_of(self, rows: Sequence[TokenRow]) -> Layout:
        return input_layout(self.model, self.layout, longest=max(row.length for row in rows))

    def _inputs(self, rows: list[TokenRow]) -> tuple[dict[str, Any], Any, Any]:
        """The model's inputs, indices of all positions in the flattened batch [N], and their labels [N]."""
        layout = self._layout_of(rows)
        inputs = {
            name: torch.from_numpy(values).to(self.device)
            for name, values in model_inputs(
                rows, pad_id=self.pad_id, layout=layout, is_causal=self.task.is_causal
            ).items()
        }
        width = inputs["input_ids"].shape[1]
        index_N = torch.from_numpy(target_places(rows, layout=layout, width=width)).to(self.device)
        labels = np.concatenate([self.task.labels_N(row) for row in rows])
        labels_N = torch.from_numpy(labels.astype(np.int64)).to(self.device)
        return inputs, index_N, labels_N

    def _logit_blocks(self, inputs: dict[str, Any], index_N: Any) -> Iterator[tuple[int, Any, Any]]:
        """(start, float32 logits [n, V], input of the output layer [n, D]) over the positions, block by block.

        Each block of logits is the caller's to overwrite.
        """
        if self._layer is not None:
            hidden_ND = self.model.base_model(**inputs, use_cache=False)[0].flatten(0, 1)[index_N]
            block = self._rows_within(PROJECTED_BYTES, len(self._layer.matrix_VD))
            for start in range(0, len(index_N), block):
                hidden_nD = hidden_ND[start : start + block]
                yield start, self._layer.logits(hidden_nD), hidden_nD
            return
        with recorded_input(self.model) as recorded:
            logits_RV = self.model(**inputs, use_cache=False).logits.flatten(0, 1)
        hidden_RD = recorded[0].flatten(0, 1) if recorded else None
        block = self._rows_within(PROJECTED_BYTES, logits_RV.shape[1])
        for start in range(0, len(index_N), block):
            chosen = index_N[start : start + block]
            yield start, logits_RV[chosen].float(), None if hidden_RD is None else hidden_RD[chosen]

    def _rows_within(self, budget: dict[str, int], width: int) -> int:
        return max(1, budget[self.device.type] // (4 * width))

    def _finish(self, row: TokenRow, captured: dict[str, NDArray[Any]]) -> Captured:
        unusable = int((~self.targets.is_usable(captured)).sum())
        if unusable:
            return Captured(
                row, None, f"the teacher's logits are not finite at {unusable} of {row.positions} positions"
            )
        return Captured(row, self.targets.finish(captured))


def _check_vocabulary(model: Any, vocabulary_size: int) -> None:
    """Raise `ModelError` for a teacher without a prediction for some token of its tokenizer."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if weight is not None and len(weight) < vocabulary_size:
        raise ModelError(
            f"{type(model).__name__} predicts {len(weight)} tokens, its tokenizer has {vocabulary_size}; take the tokenizer "
            "that it was trained with, without tokens that were added later (a padding token, most often)"
        )


def _too_long(row: TokenRow, said: str) -> Captured:
    return Captured(row, None, f"out of memory with this row of {row.length} tokens alone ({said})")
