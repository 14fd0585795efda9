"""The rows of one cache as a student learns from them: how one is read, and what a batch holds of the targets of several.

A run chooses one kind of rows, and nothing after it asks which:

    OwnRows        in the teacher's tokens, which are the student's
    AlignedRows    in the tokens of a student with another tokenizer (aligned_tensors.py)
    EnsembleRows   with what other teachers' caches have of the same text (ensemble_rows.py)

Shapes: B sequences, S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from teachercache.cache import Cache, StoredRow
from teachercache.cache.reader import Split
from teachercache.targets import StoredTargets, TargetKind
from teachercache.targets.layers.attention import sees
from teachercache.tokens.rows import TokenRow


class RowTensors(Protocol):
    """Makes the targets of a batch; picklable, and without a cache in it."""

    def __call__(
        self, rows: Sequence[Any], tokens: Sequence[TokenRow], packed_with: Sequence[Sequence[int]]
    ) -> dict[str, dict[str, torch.Tensor]]:
        """`targets`, and with columns of layers `layers`, of some rows (as `CacheRows.read` gives them).

        `tokens` are the sequences of the batch, and `packed_with` says which rows, in order, each of them holds; no rows have
        one sequence of padding.
        """


class CacheRows(Protocol):
    """The rows of one cache; picklable. `length` is the number of tokens of the longest one, and `pad_id` fills up the others,
    both in the tokens that the student reads."""

    @property
    def cache(self) -> Cache:
        """Cache that stores them."""

    @property
    def length(self) -> int:
        """Most tokens in a row."""

    @property
    def pad_id(self) -> int:
        """Token that fills up batches."""

    @property
    def tensors(self) -> RowTensors:
        """Makes tensors of several."""

    def read(self, split: Split, index: int) -> Any:
        """One row; its `row` is a `TokenRow`."""


@dataclass(frozen=True, eq=False)
class OwnRows:
    """Rows in the teacher's tokens, with the target columns that are asked for: nothing else is decompressed."""

    cache: Cache
    columns: tuple[str, ...]

    @property
    def length(self) -> int:
        """See `CacheRows`."""
        return self.cache.manifest.sequence_length

    @property
    def pad_id(self) -> int:
        """See `CacheRows`."""
        return self.cache.manifest.pad_id

    @property
    def tensors(self) -> RowTensors:
        """See `CacheRows`."""
        return OwnTensors(self.cache.targets, self.columns)

    def read(self, split: Split, index: int) -> StoredRow:
        """See `CacheRows`."""
        return self.cache.read_row(split, index, columns=self.columns, segments=has_segments(self.cache))


def has_segments(cache: Cache) -> bool:
    """Tells whether rows are read with their segments, and the text in them: nobody asks for these where a row has one
    alone."""
    return cache.manifest.layout == "packed"


@dataclass(frozen=True, eq=False)
class OwnTensors:
    """Makes `targets`: a tensor [N, …] for each array that the kind of logits decodes from the columns, ids as int64 and other
    numbers as float32; and with columns of layers `layers`: what they decode to, [B, S, …], or [B, S, S, …] by query and key
    of columns by pair, zero where there is padding or a query does not see; and `segment`, the number of each token's segment
    in its row, int64 [B, S], -1 for padding."""

    stored: StoredTargets
    columns: Sequence[str]

    def __call__(
        self, rows: Sequence[StoredRow], tokens: Sequence[TokenRow], packed_with: Sequence[Sequence[int]]
    ) -> dict[str, dict[str, torch.Tensor]]:
        of_logits = {column.name for column in self.stored.logits.columns}
        names = [name for name in self.columns if name in of_logits]
        batch = {"targets": _logit_targets(rows, self.stored.logits, names)}
        of_layers = [name for name in self.columns if name not in of_logits]
        if of_layers:
            batch["layers"] = _layers(rows, tokens, self.stored, of_layers)
        return batch


def _layers(
    rows: Sequence[StoredRow], tokens: Sequence[TokenRow], targets: StoredTargets, columns: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Rows may be fewer than `tokens` has sequences of: one of padding; or more: several in a sequence."""
    longest = max(row.length for row in tokens)
    segment_BS = np.full((len(tokens), longest), -1, dtype=np.int64)
    if rows:
        for segment_S, row in zip(segment_BS, tokens, strict=True):
            segment_S[: row.length] = row.segment_S()
    decoded = [targets.decoded({name: stored.targets[name] for name in columns}) for stored in rows]
    if not decoded:
        nothing = {column.name: np.empty((0, *column.shape), column.dtype) for column in targets.columns}
        decoded = [targets.decoded({name: nothing[name] for name in columns})]
    batch = {"segment": torch.from_numpy(segment_BS)}
    of_pairs = {column.name for column in targets.columns if column.of == "pair"}
    # Rows in a sequence stand one after the other, and so do their tokens, and their pairs.
    is_token_BS = batch["segment"] >= 0
    is_pair_BSS = sees(torch, batch["segment"], window=None) if of_pairs & decoded[0].keys() else is_token_BS
    for name in decoded[0]:
        places = is_pair_BSS if name in of_pairs else is_token_BS
        values = torch.from_numpy(np.concatenate([arrays[name] for arrays in decoded]))
        batch[name] = values.new_zeros(*places.shape, *values.shape[1:])
        batch[name][places] = values
    return batch


def _logit_targets(rows: Sequence[StoredRow], kind: TargetKind, columns: Sequence[str]) -> dict[str, torch.Tensor]:
    decoded = [kind.decoded({name: stored.targets[name] for name in columns}) for stored in rows]
    if not decoded:
        nothing = {column.name: np.empty((0, *column.shape), column.dtype) for column in kind.columns}
        decoded = [kind.decoded({name: nothing[name] for name in columns})]
    return {name: torch.from_numpy(_concatenated([arrays[name] for arrays in decoded])) for name in decoded[0]}


def _concatenated(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(arrays, dtype=np.int64 if arrays[0].dtype == np.int32 else arrays[0].dtype)
