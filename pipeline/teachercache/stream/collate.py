"""Rows to the tensors of one forward pass.

`shift_labels[b, i]` is the label at row token i wherever a target is stored: of next-token prediction the token that follows,
`input_ids[b, i + 1]`. Elsewhere it is -100: at the last token of every segment, on prompt tokens of a chat and on padding.

Shapes: B rows, S tokens, N positions in row-major order of (b, i).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from teachercache.models.loading import model_inputs
from teachercache.stream.cache_rows import CacheRows, RowTensors
from teachercache.stream.dataset import Rows
from teachercache.stream.packing import first_fit, merged
from teachercache.tasks.contract import NO_TARGET, Task
from teachercache.tasks.next_token import NEXT_TOKEN
from teachercache.tokens.rows import TokenRow


@dataclass(frozen=True)
class Collator:
    """`collate` with what the rows of a cache fix; picklable, so that loading processes can run it."""

    layout: str
    pad_id: int
    tensors: RowTensors
    task: Task
    pack_length: int | None = None
    flat: bool = False

    @classmethod
    def of(cls, rows: CacheRows, *, pack: bool = False, one_row: bool = False, context: int | None = None) -> Collator:
        """The collator for the rows of a cache; `pack` puts short rows into sequences as long as its longest.
        `one_row`: packed rows of a micro-batch, and those that `pack` packs, become a single sequence.
        Where rows are longer than `context`, all are given as packed ones, each with positions of its own."""
        layout = "packed" if context is not None and rows.length > context else rows.cache.manifest.layout
        flat = one_row and (pack or layout == "packed")
        task = rows.cache.task
        return cls(layout, rows.pad_id, rows.tensors, task, pack_length=rows.length if pack else None, flat=flat)

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        return collate(
            rows,
            layout=self.layout,
            pad_id=self.pad_id,
            tensors=self.tensors,
            task=self.task,
            pack_length=self.pack_length,
            flat=self.flat,
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
    tensors: RowTensors,
    task: Task = NEXT_TOKEN,
    pack_length: int | None = None,
    flat: bool = False,
) -> dict[str, Any]:
    """`input_ids` and `shift_labels` int64 [B, S], for packed rows `position_ids` [B, S], and what `tensors` makes of the
    rows' targets. `shift_labels` are those of the `task`; where that is not causal there is an `attention_mask` [B, S] besides.

    With `pack_length` B counts sequences of several rows, isolated as in the packed layout, and positions follow their order;
    `flat`: there is one such sequence, however long, and no padding.
    No rows give one row of padding with N = 0: a process whose share is empty still takes part in collectives.
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
    inputs = model_inputs(tokens, pad_id=pad_id, layout=layout, is_causal=task.is_causal)
    batch: dict[str, Any] = {name: torch.from_numpy(array) for name, array in inputs.items()}
    batch["shift_labels"] = torch.from_numpy(_labels(tokens, task, longest=inputs["input_ids"].shape[1]))
    return batch | tensors(rows, tokens, bins)


def _renumbered(bins: Sequence[Sequence[int]]) -> list[list[int]]:
    """The same sizes, of rows that stand in the order of their bins."""
    ends = np.cumsum([len(chosen) for chosen in bins]).tolist()
    return [list(range(end - len(chosen), end)) for end, chosen in zip(ends, bins, strict=True)]


def _labels(rows: Sequence[TokenRow], task: Task, *, longest: int) -> NDArray[np.int64]:
    labels_BS = np.full((len(rows), longest), NO_TARGET, dtype=np.int64)
    for labels_S, row in zip(labels_BS, rows, strict=True):
        labels_S[: row.length][row.target_mask_S] = task.labels_N(row)
    return labels_BS


def _padding(pad_id: int) -> TokenRow:
    return TokenRow("", False, np.full(2, pad_id, dtype=np.int32), np.zeros(2, dtype=np.bool_), ())
