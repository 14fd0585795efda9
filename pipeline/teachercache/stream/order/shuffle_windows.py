"""Shard-aware shuffling: the order of one cache's rows in an epoch, a pure function of (its manifest, seed, epoch).

    epoch    shards in a random order, cut into *windows* of so many shards
    window   its shards cut into *blocks* of neighbouring rows, about a record batch each; blocks in a random order
    group    as many blocks as `GROUP_BYTES` hold: their rows, shuffled

A reader needs the shards of one window at a time (of two where a batch lies across), so that local copies in front of an
object store, where they hold that many, are fetched once an epoch; and the record batches of one group, which it keeps
decompressed, so that each is decompressed once or twice an epoch. The price: rows of one batch come from the blocks of a
group, some hundred, drawn from all over the window; which shards share a window, and which blocks a group, is drawn anew in
each epoch. A cache of one group is shuffled as a whole.

Any row of an epoch is found without those before it: a search among windows, groups and blocks, and a keyed permutation
(permutation.py). What an epoch costs once is a table of its shards, a tenth of a second for 100,000 of them; what a window
costs once, a table of its blocks.

Shapes: S shards, W windows, B blocks of a window, G groups of a window, N indices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teachercache.stream.order.permutation import order_key, permuted

Indices = NDArray[np.int64]
WINDOW = 64  # shards
# Half of what a reader keeps decompressed (`cache.shards.shard_set.KEPT_BYTES`): a block may lie across two record batches.
GROUP_BYTES = 128 * 2**20
ORDER = 2  # a run goes on in the order that it began in: raise it with every change of what comes when


@dataclass(frozen=True, eq=False)
class _Epoch:
    shard_S: Indices  # in the epoch's order
    end_W: Indices  # rows of a window and those before it


@dataclass(frozen=True, eq=False)
class _Window:
    epoch: int
    number: int
    start_B: Indices  # first row of a block, blocks in the window's order
    end_B: Indices  # rows of a block and those before it in the window
    end_G: Indices  # rows of a group and those before it in the window


class RowOrder:
    """The rows of a split, epoch by epoch. `shard_rows[s]` rows of shard s are numbered in the order of shards; its blocks
    have `block_rows[s]` rows, `block_bytes[s]` in memory."""

    def __init__(
        self,
        shard_rows: Sequence[int] | Indices,
        *,
        block_rows: Sequence[int] | Indices,
        block_bytes: Sequence[int] | Indices,
        fingerprint: str,
        seed: int,
        window: int = WINDOW,
        group_bytes: int = GROUP_BYTES,
    ) -> None:
        self.shard_rows_S = np.asarray(shard_rows, dtype=np.int64)
        self.block_rows_S = np.asarray(block_rows, dtype=np.int64)
        self.block_bytes_S = np.asarray(block_bytes, dtype=np.int64)
        self.rows = int(self.shard_rows_S.sum())
        self.fingerprint, self.seed, self.window, self.group_bytes = fingerprint, seed, window, group_bytes
        self._start_S = np.cumsum(self.shard_rows_S) - self.shard_rows_S
        self._epochs: dict[int, _Epoch] = {}  # the last two
        self._last_window: _Window | None = None

    def rows_at(self, epoch: int, index_N: Indices) -> Indices:
        """The rows that come as number `index_N` of an epoch; raises `IndexError` outside of 0 … rows - 1."""
        index_N = np.asarray(index_N, dtype=np.int64)
        if index_N.size and (index_N.min() < 0 or index_N.max() >= self.rows):
            raise IndexError(f"an epoch has rows 0 … {self.rows - 1}")
        return _piecewise(index_N, self._epoch(epoch).end_W, partial(self._rows_of_window, epoch))

    def shards_at(self, epoch: int, index: int) -> tuple[list[int], list[int]]:
        """The shards of the window that row number `index` of an epoch lies in, and those of the next window, which may be
        the next epoch's first."""
        tables = self._epoch(epoch)
        window = int(np.searchsorted(tables.end_W, index, side="right"))
        following = (epoch, window + 1) if window + 1 < len(tables.end_W) else (epoch + 1, 0)
        here, then = (
            self._epoch(number).shard_S[place * self.window : (place + 1) * self.window].tolist()
            for number, place in ((epoch, window), following)
        )
        return here, then

    def _rows_of_window(self, epoch: int, window: int, index_N: Indices, rows: int) -> Indices:
        tables = self._window(epoch, window)
        place_N = _piecewise(index_N, tables.end_G, partial(self._places_of_group, epoch, window))
        block_N = np.searchsorted(tables.end_B, place_N, side="right")
        before_N = np.where(block_N > 0, tables.end_B[block_N - 1], 0)
        return tables.start_B[block_N] + place_N - before_N

    def _places_of_group(self, epoch: int, window: int, group: int, index_N: Indices, rows: int) -> Indices:
        """Shuffled within the group, counted from the window's first row."""
        tables = self._window(epoch, window)
        start = int(tables.end_G[group]) - rows
        whole = len(tables.end_G) == 1 and len(self._epoch(epoch).end_W) == 1
        return start + permuted(index_N, size=rows, key=self._key(epoch, "" if whole else f"/{window}/{group}"))

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            count = len(self.shard_rows_S)
            shard_S = np.arange(count, dtype=np.int64)
            if count > self.window:
                shard_S = permuted(shard_S, size=count, key=self._key(number, "/shards"))
            last_W = np.minimum(np.arange(1, math.ceil(count / self.window) + 1) * self.window, count) - 1
            while len(self._epochs) > 1:
                del self._epochs[min(self._epochs)]
            self._epochs[number] = _Epoch(shard_S, np.cumsum(self.shard_rows_S[shard_S])[last_W])
        return self._epochs[number]

    def _window(self, epoch: int, number: int) -> _Window:
        known = self._last_window
        if known is None or (known.epoch, known.number) != (epoch, number):
            known = self._last_window = self._made(epoch, number)
        return known

    def _made(self, epoch: int, number: int) -> _Window:
        chosen = self._epoch(epoch).shard_S[number * self.window : (number + 1) * self.window]
        starts, sizes, held = [], [], []
        for shard in chosen.tolist():
            rows, step = int(self.shard_rows_S[shard]), int(self.block_rows_S[shard])
            first_B = np.arange(0, rows, step)
            starts.append(self._start_S[shard] + first_B)
            sizes.append(np.minimum(rows - first_B, step))
            held.append(np.full(len(first_B), self.block_bytes_S[shard]))
        start_B, size_B, bytes_B = (np.concatenate(arrays) for arrays in (starts, sizes, held))
        if int(bytes_B.sum()) > self.group_bytes:
            order_B = permuted(np.arange(len(start_B)), size=len(start_B), key=self._key(epoch, f"/{number}/blocks"))
            start_B, size_B, bytes_B = start_B[order_B], size_B[order_B], bytes_B[order_B]
        group_B = (np.cumsum(bytes_B) - 1) // self.group_bytes
        last_B = np.append(group_B[1:] != group_B[:-1], True)
        end_B = np.cumsum(size_B)
        return _Window(epoch, number, start_B, end_B, end_B[last_B])

    def _key(self, epoch: int, part: str) -> bytes:
        return order_key(self.fingerprint, seed=self.seed, epoch=epoch, part=part)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_epochs": {}, "_last_window": None}


def _piecewise(index_N: Indices, end_P: Indices, within: Any) -> Indices:
    """`within(piece, indices from the piece's first on, rows of the piece)` for the indices that lie in each piece."""
    piece_N = np.searchsorted(end_P, index_N, side="right")
    found_N = np.empty_like(index_N)
    for piece in np.unique(piece_N).tolist():
        start = int(end_P[piece - 1]) if piece else 0
        chosen_N = piece_N == piece
        found_N[chosen_N] = within(piece, index_N[chosen_N] - start, int(end_P[piece]) - start)
    return found_N
