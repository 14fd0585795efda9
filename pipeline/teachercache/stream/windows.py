"""Shard-aware shuffling: the order of one cache's rows in an epoch, a pure function of (its shards, seed, epoch).

Shards are put in a random order and cut into *windows* of a fixed number; the rows of a window are shuffled together. So a
reader needs the shards of one window at a time (of two where a batch lies across), and a bounded local cache in front of an
object store never fetches a shard twice in an epoch. The price: rows of different windows do not meet in a batch of that
epoch; which shards share a window is drawn anew in the next. A cache within one window is shuffled as a whole.

Any row of an epoch is found without those before it: a search among windows, a keyed permutation within (order.py), a
search among shards. What an epoch costs once is a table of its shards: 10 ms for 100,000 of them.

Shapes: S shards, W windows, N indices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teachercache.stream.order import order_key, permuted

Indices = NDArray[np.int64]
WINDOW = 64  # shards


@dataclass(frozen=True, eq=False)
class _Epoch:
    """Where rows lie in one epoch."""

    shard_S: Indices  # in the epoch's order
    end_S: Indices  # rows of that shard and those before it
    end_W: Indices  # rows of a window and those before it


class RowOrder:
    """The rows of a split, epoch by epoch. `shard_rows[s]` rows of shard s are numbered in the order of shards."""

    def __init__(
        self, shard_rows: Sequence[int] | Indices, *, fingerprint: str, seed: int, window: int = WINDOW
    ) -> None:
        self.shard_rows_S = np.asarray(shard_rows, dtype=np.int64)
        self.rows = int(self.shard_rows_S.sum())
        self.fingerprint, self.seed, self.window = fingerprint, seed, window
        self._start_S = np.cumsum(self.shard_rows_S) - self.shard_rows_S
        self._last: tuple[int, _Epoch] | None = None

    def rows_at(self, epoch: int, index_N: Indices) -> Indices:
        """The rows that come as number `index_N` of an epoch; raises `IndexError` outside of 0 … rows - 1."""
        index_N = np.asarray(index_N, dtype=np.int64)
        if index_N.size and (index_N.min() < 0 or index_N.max() >= self.rows):
            raise IndexError(f"an epoch has rows 0 … {self.rows - 1}")
        tables = self._tables(epoch)
        window_N = np.searchsorted(tables.end_W, index_N, side="right")
        place_N = np.empty_like(index_N)
        for window in np.unique(window_N).tolist():
            chosen_N = window_N == window
            start = int(tables.end_W[window - 1]) if window else 0
            size = int(tables.end_W[window]) - start
            key = self._key(epoch, f"/{window}" if len(tables.end_W) > 1 else "")
            place_N[chosen_N] = start + permuted(index_N[chosen_N] - start, size=size, key=key)
        slot_N = np.searchsorted(tables.end_S, place_N, side="right")
        shard_N = tables.shard_S[slot_N]
        before_N = tables.end_S[slot_N] - self.shard_rows_S[shard_N]
        return self._start_S[shard_N] + place_N - before_N

    def shards_at(self, epoch: int, index: int) -> list[int]:
        """The shards that hold the rows around number `index` of an epoch: its window's, then the next window's."""
        tables = self._tables(epoch)
        window = int(np.searchsorted(tables.end_W, index, side="right"))
        return tables.shard_S[window * self.window : (window + 2) * self.window].tolist()

    def _tables(self, epoch: int) -> _Epoch:
        if self._last is None or self._last[0] != epoch:
            self._last = (epoch, self._made(epoch))
        return self._last[1]

    def _made(self, epoch: int) -> _Epoch:
        count = len(self.shard_rows_S)
        shard_S = np.arange(count, dtype=np.int64)
        if count > self.window:
            shard_S = permuted(shard_S, size=count, key=self._key(epoch, "/shards"))
        end_S = np.cumsum(self.shard_rows_S[shard_S])
        last_W = np.minimum(np.arange(1, math.ceil(count / self.window) + 1) * self.window, count) - 1
        return _Epoch(shard_S, end_S, end_S[last_W])

    def _key(self, epoch: int, part: str) -> bytes:
        return order_key(self.fingerprint, seed=self.seed, epoch=epoch, part=part)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_last": None}
