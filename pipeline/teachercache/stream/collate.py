"""Rows to the tensors of one forward pass.

Row token i predicts token i + 1, so `shift_labels[b, i]` is `input_ids[b, i + 1]` wherever a target is stored, and -100
elsewhere: at the last token of every segment, on prompt tokens of a chat and on padding.

Shapes: B rows, S tokens, N positions in row-major order of (b, i), X numbers of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from teachercache.cache import Cache, StoredRow
from teachercache.cache.alignment import CacheAlignment
from teachercache.models.loading import model_inputs
from teachercache.stream.aligned_tensors import joined_tensors
from teachercache.stream.dataset import Rows
from teachercache.stream.ensemble_rows import TeacherTargets, ensemble_targets
from teachercache.stream.packing import first_fit, merged
from teachercache.targets import StoredTargets, TargetKind
from teachercache.targets.layers.attention import sees
from teachercache.tokens.rows import TokenRow

IGNORED = -100  # the label that losses of torch and transformers skip


@dataclass(frozen=True)
class Collator:
    """`collate` with what a manifest fixes; picklable, so that loading processes can run it."""

    layout: str
    pad_id: int
    targets: StoredTargets
    columns: tuple[str, ...]
    pack_length: int | None = None
    flat: bool = False
    joined: bool = False  # rows are joined to a student's tokens
    other_teachers: tuple[TeacherTargets, ...] = ()  # rows are `EnsembleRow`s

    @classmethod
    def of(
        cls,
        cache: Cache,
        *,
        columns: Sequence[str],
        pack: bool = False,
        one_row: bool = False,
        context: int | None = None,
        alignment: CacheAlignment | None = None,
        other_teachers: Sequence[TeacherTargets] = (),
    ) -> Collator:
        """The collator for some target columns of a cache; `pack` puts short rows into sequences as long as its longest.
        `one_row`: packed rows of a micro-batch, and those that `pack` packs, become a single sequence.
        Where rows are longer than `context`, all are given as packed ones, each with positions of its own."""
        manifest = cache.manifest
        if alignment is None:
            length, pad_id = manifest.sequence_length, manifest.pad_id
        else:
            length, pad_id = alignment.manifest.sequence_length, alignment.manifest.pad_id
        layout = "packed" if context is not None and length > context else manifest.layout
        flat = one_row and (pack or layout == "packed")
        return cls(
            layout, pad_id, cache.targets, tuple(columns), pack_length=length if pack else None, flat=flat,
            joined=alignment is not None, other_teachers=tuple(other_teachers),
        )  # fmt: skip

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        return collate(
            rows,
            layout=self.layout,
            pad_id=self.pad_id,
            targets=self.targets,
            columns=self.columns,
            pack_length=self.pack_length,
            flat=self.flat,
            joined=self.joined,
            other_teachers=self.other_teachers,
        )


@dataclass(frozen=True)
class MixedCollator:
    """Micro-batches of several caches, each by the collator of its cache, which `source` names in the batch."""

    collators: tuple[Collator, ...]

    def __call__(self, rows: Rows) -> dict[str, Any]:
        return {**self.collators[rows.source](rows.rows), "source": rows.source}


def collate(
    rows: Sequence[Any],
    *,
    layout: str,
    pad_id: int,
    targets: StoredTargets,
    columns: Sequence[str],
    pack_length: int | None = None,
    flat: bool = False,
    joined: bool = False,
    other_teachers: Sequence[TeacherTargets] = (),
) -> dict[str, Any]:
    """`input_ids` and `shift_labels` int64 [B, S], for packed rows `position_ids` [B, S], and `targets`: a tensor
    [N, …] for each array that the kind of logits decodes from these columns, ids as int64 and other numbers as float32.

    With columns of layers also `layers`: what they decode to, [B, S, …], or [B, S, S, …] by query and key of columns by pair,
    zero where there is padding or a query does not see; and `segment`, the number of each token's segment in its row, int64
    [B, S], -1 for padding.

    With `pack_length` B counts sequences of several rows, isolated as in the packed layout, and positions follow their order;
    `flat`: there is one such sequence, however long, and no padding.
    No rows give one row of padding with N = 0: a process whose share is empty still takes part in collectives.

    Rows that are `joined` to a student's tokens (`JoinedRow`) give those, and `targets` where each chunk begins, [M, …], with
    the arrays of `cross_tokenizer.batch.Chunks`; `layers` then hold aligned tokens alone, A of them: `student` and `teacher`
    say which of either side's they are.

    With `other_teachers` rows are `EnsembleRow`s, and `targets` hold what `ensemble_targets` makes of them besides.
    """
    tokens = [stored.row for stored in rows] or [_padding(pad_id)]
    bins = [[index] for index in range(len(rows))]
    if (flat or pack_length is not None) and len(rows) > 1:
        lengths = [row.length for row in tokens]
        bins = first_fit(lengths, longest=sum(lengths) if flat or pack_length is None else pack_length)
        rows = [rows[index] for chosen in bins for index in chosen]
        tokens = [merged([tokens[index] for index in chosen]) for chosen in bins]
        bins = _renumbered(bins)
        layout = "packed"
    inputs = model_inputs(tokens, pad_id=pad_id, layout=layout)
    batch: dict[str, Any] = {name: torch.from_numpy(array) for name, array in inputs.items()}
    batch["shift_labels"] = torch.from_numpy(_shift_labels(tokens, longest=inputs["input_ids"].shape[1]))
    if joined:
        return batch | joined_tensors(rows, targets, columns, packed_with=bins)
    of_logits = {column.name for column in targets.logits.columns}
    batch["targets"] = _joined(rows, targets.logits, [name for name in columns if name in of_logits])
    if other_teachers:
        batch["targets"] |= ensemble_targets(rows, other_teachers)
    of_layers = [name for name in columns if name not in of_logits]
    if of_layers:
        batch["layers"] = _layers(rows, tokens, targets, of_layers)
    return batch


def _renumbered(bins: Sequence[Sequence[int]]) -> list[list[int]]:
    """The same sizes, of rows that stand in the order of their bins."""
    ends = np.cumsum([len(chosen) for chosen in bins]).tolist()
    return [list(range(end - len(chosen), end)) for end, chosen in zip(ends, bins, strict=True)]


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


def _shift_labels(rows: Sequence[TokenRow], *, longest: int) -> NDArray[np.int64]:
    labels_BS = np.full((len(rows), longest), IGNORED, dtype=np.int64)
    for labels_S, row in zip(labels_BS, rows, strict=True):
        labels_S[: row.length][row.target_mask_S] = row.labels_N()
    return labels_BS


def _joined(rows: Sequence[StoredRow], kind: TargetKind, columns: Sequence[str]) -> dict[str, torch.Tensor]:
    decoded = [kind.decoded({name: stored.targets[name] for name in columns}) for stored in rows]
    if not decoded:
        nothing = {column.name: np.empty((0, *column.shape), column.dtype) for column in kind.columns}
        decoded = [kind.decoded({name: nothing[name] for name in columns})]
    return {name: torch.from_numpy(_concatenated([arrays[name] for arrays in decoded])) for name in decoded[0]}


def _concatenated(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(arrays, dtype=np.int64 if arrays[0].dtype == np.int32 else arrays[0].dtype)


def _padding(pad_id: int) -> TokenRow:
    return TokenRow("", False, np.full(2, pad_id, dtype=np.int32), np.zeros(2, dtype=np.bool_), ())
