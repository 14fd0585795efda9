"""Rows in a student's own tokens: read, and made into the tensors that losses across tokenizers, and terms between layers at
aligned tokens, are formed from.

Shapes: B sequences, A aligned tokens of one, filled up; M chunks of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from teachercache.cache import Cache
from teachercache.cache.alignment import CacheAlignment
from teachercache.cache.reader import Split
from teachercache.stream.aligned_rows import AlignedPair, aligned_tokens, chunk_arrays
from teachercache.stream.cache_rows import RowTensors, has_segments
from teachercache.targets import StoredTargets
from teachercache.targets.logits.boundary_mass import BOUNDARY_MASS
from teachercache.targets.logits.kind import ACTUAL
from teachercache.tokens.rows import TokenRow

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class AlignedRows:
    """Rows in the tokens of a student with another tokenizer, aligned with the cache's; a `CacheRows`."""

    cache: Cache
    alignment: CacheAlignment
    columns: tuple[str, ...]

    @property
    def length(self) -> int:
        """See `CacheRows`."""
        return self.alignment.manifest.sequence_length

    @property
    def pad_id(self) -> int:
        """See `CacheRows`."""
        return self.alignment.manifest.pad_id

    @property
    def tensors(self) -> RowTensors:
        """See `CacheRows`."""
        return AlignedTensors(self.cache.targets, self.columns)

    def read(self, split: Split, index: int) -> AlignedPair:
        """See `CacheRows`."""
        segments = has_segments(self.cache)
        stored = self.cache.read_row(split, index, columns=self.columns, segments=segments)
        aligned = self.alignment.aligned_row(split, index, stored, segments=segments)
        return AlignedPair(aligned.row, stored, aligned.targets)


@dataclass(frozen=True, eq=False)
class AlignedTensors:
    """Makes `targets` where each chunk begins, [M, …], with the arrays of `cross_tokenizer.batch.Chunks`; with columns of
    layers `layers`, of aligned tokens alone, A of them: `student` and `teacher` say which of either side's they are."""

    stored: StoredTargets
    columns: Sequence[str]

    def __call__(
        self, rows: Sequence[AlignedPair], tokens: Sequence[TokenRow], packed_with: Sequence[Sequence[int]]
    ) -> dict[str, dict[str, torch.Tensor]]:
        of_logits = {column.name for column in self.stored.logits.columns} | {BOUNDARY_MASS}
        batch = {"targets": _targets(rows, self.stored, self.columns)}
        of_layers = [name for name in self.columns if name not in of_logits]
        if of_layers:
            batch["layers"] = _layers(rows, self.stored, of_layers, packed_with)
        return batch


def _targets(rows: Sequence[AlignedPair], targets: StoredTargets, columns: Sequence[str]) -> dict[str, torch.Tensor]:
    if rows:
        decoded, chunks = chunk_arrays(rows, targets, columns)
    else:
        wanted = [column for column in targets.logits.columns if column.name in columns]
        nothing = {column.name: np.empty((0, *column.shape), column.dtype) for column in wanted}
        decoded = targets.logits.decoded(nothing) if nothing else {}
        chunks = {name: np.empty(0, np.int64) for name in ("first", "last", "of", "label_bytes")}
        chunks |= {name: np.empty(0, np.float32) for name in ("log_prob", "boundary")}
    tensors = {f"chunk_{name}": torch.from_numpy(np.ascontiguousarray(values)) for name, values in chunks.items()}
    for name, values in decoded.items():
        if name == ACTUAL:  # is in the chunks' likelihoods
            continue
        tensors[name] = torch.from_numpy(values.astype(np.int64) if values.dtype == np.int32 else values)
    return tensors


def _layers(
    rows: Sequence[AlignedPair], targets: StoredTargets, columns: Sequence[str], packed_with: Sequence[Sequence[int]]
) -> dict[str, torch.Tensor]:
    """Returns the arrays of aligned tokens: `student`, the token's index in its sequence; `teacher`, its place in the
    teacher's segment; `first`, 1 where it is the first token of either's segment; `segment`, -1 where there is none;
    and what layers decode to, [B, A, …]."""
    sequences = [_sequence([rows[index] for index in chosen], targets, columns) for chosen in packed_with]
    sequences = sequences or [_nothing(targets, columns)]
    longest = max(1, *(len(sequence["segment"]) for sequence in sequences))
    batch = {}
    for name, values in sequences[0].items():
        filled = np.full((len(sequences), longest, *values.shape[1:]), -1 if name == "segment" else 0, values.dtype)
        for place, sequence in zip(filled, sequences, strict=True):
            place[: len(sequence[name])] = sequence[name]
        batch[name] = torch.from_numpy(filled)
    return batch


def _sequence(rows: Sequence[AlignedPair], targets: StoredTargets, columns: Sequence[str]) -> dict[str, Array]:
    parts: list[dict[str, Array]] = []
    tokens = segments = 0
    for stored in rows:
        student_A, teacher_A = aligned_tokens(stored)
        segment_T = stored.teacher.row.segment_S()
        part = {"student": student_A + tokens, "segment": segment_T[teacher_A] + segments}
        places = stored.teacher.row.position_ids_S()[teacher_A], stored.row.position_ids_S()[student_A]
        part["teacher"], part["first"] = places[0], (np.minimum(*places) == 0).astype(np.int64)
        decoded = targets.decoded({name: stored.teacher.targets[name] for name in columns})
        parts.append({**part, **{name: values[teacher_A] for name, values in decoded.items()}})
        tokens, segments = tokens + stored.row.length, segments + int(segment_T[-1]) + 1
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _nothing(targets: StoredTargets, columns: Sequence[str]) -> dict[str, Array]:
    empty = {column.name: np.empty((0, *column.shape), column.dtype) for column in targets.columns}
    decoded = targets.decoded({name: empty[name] for name in columns})
    return {**{name: np.empty(0, np.int64) for name in ("student", "segment", "teacher", "first")}, **decoded}
