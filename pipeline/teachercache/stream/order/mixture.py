"""Several caches in one run, in stated shares, dealt as evenly as rows can be: which cache gives row number n of an epoch,
and how many it gave before, is arithmetic.

An epoch is one pass over the first cache. The others are drawn by their shares: over and over where a share asks for more
rows than a cache has, each row once before any comes again.

Dealing goes along a chain: of n rows the first cache gets round(n · share), the second its part of the rest, and so on.
Each count grows by at most one a row, so that every row has one owner, and strays from its share by less than a row for
each cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from teachercache.errors import RecipeError
from teachercache.stream.order.shuffle_windows import RowOrder

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Mixture:
    """The rows of all epochs. Rows of all caches are numbered one cache after the other: `locate` undoes it."""

    orders: tuple[RowOrder, ...]
    draws: tuple[int, ...]  # rows that each cache gives to an epoch
    drawn: tuple[int, ...] = ()  # rows that each has given before the first epoch, in earlier phases; (): none

    @classmethod
    def of(cls, orders: Sequence[RowOrder], *, shares: Sequence[float | None] = ()) -> Mixture:
        """`shares[i]` is what the further cache `orders[i + 1]` has of the rows; None: its rows come as often as the first's.

        Raises `RecipeError` where shares leave nothing to the first cache.
        """
        first = orders[0].rows
        stated = sum(share for share in shares if share is not None)
        if stated >= 1:
            raise RecipeError(
                f"stream.mix: shares add up to {stated:g} and leave nothing to `cache`; they must stay below 1"
            )
        alike = first + sum(order.rows for order, share in zip(orders[1:], shares, strict=True) if share is None)
        total = alike / (1 - stated)
        draws = [
            order.rows if share is None else max(1, round(total * share))
            for order, share in zip(orders[1:], shares, strict=True)
        ]
        return cls(tuple(orders), (first, *draws))

    def going_on(self, drawn: Sequence[int], *, shares: Sequence[float] | None = None) -> Mixture:
        """The mixture of a phase before which each cache has given `drawn` rows. `shares` are those of all caches, and add up
        to 1; 0 leaves a cache out. An epoch is then one pass over the first cache that has a share."""
        if shares is None:
            return Mixture(self.orders, self.draws, tuple(drawn))
        rows, share = next((order.rows, share) for order, share in zip(self.orders, shares, strict=True) if share > 0)
        draws = [max(1, round(rows * other / share)) if other > 0 else 0 for other in shares]
        return Mixture(self.orders, tuple(draws), tuple(drawn))

    def drawn_after(self, epoch: int, index: int) -> tuple[int, ...]:
        """Rows that each cache has given before row number `index` of an epoch, those of earlier phases with them."""
        counted = zip(self._before, self.draws, self._counts(index), strict=True)
        return tuple(before + epoch * draws + count for before, draws, count in counted)

    @property
    def _before(self) -> tuple[int, ...]:
        return self.drawn or (0,) * len(self.orders)

    @property
    def rows(self) -> int:
        """Rows in an epoch."""
        return sum(self.draws)

    @property
    def sources(self) -> int:
        """Caches that give rows."""
        return sum(draws > 0 for draws in self.draws)

    @property
    def starts(self) -> list[int]:
        """The number of the first row of each cache."""
        return list(accumulate((order.rows for order in self.orders[:-1]), initial=0))

    def locate(self, row: int) -> tuple[int, int]:
        """Returns the cache that a row belongs to, and the row's index there."""
        source = int(np.searchsorted(self.starts, row, side="right")) - 1
        return source, row - self.starts[source]

    def rows_at(self, epoch: int, index_N: Indices) -> Indices:
        """The rows that come as number `index_N` of an epoch."""
        if len(self.orders) == 1 and not any(self.drawn):
            return self.orders[0].rows_at(epoch, index_N)
        dealt = [self._dealt(index) for index in np.asarray(index_N).tolist()]
        rows_N = np.empty(len(dealt), dtype=np.int64)
        for source, (order, start) in enumerate(zip(self.orders, self.starts, strict=True)):
            places = [place for place, (owner, _) in enumerate(dealt) if owner == source]
            drawn = [self._before[source] + epoch * self.draws[source] + dealt[place][1] for place in places]
            rows_N[places] = start + self._rows_of(order, drawn)
        return rows_N

    def shards_at(self, epoch: int, index: int) -> list[list[int]]:
        """The shards of each cache that hold the rows around number `index` of an epoch, then those needed next."""
        windows = [
            order.shards_at(*divmod(drawn, order.rows)) if draws else ([], [])
            for order, draws, drawn in zip(self.orders, self.draws, self.drawn_after(epoch, index), strict=True)
        ]
        return [list(dict.fromkeys([*here, *then])) for here, then in windows]

    def _counts(self, index: int) -> list[int]:
        """Counts the rows that each cache gives to the first `index` rows of an epoch."""
        counts, rest, total = [], index, self.rows
        for draws in self.draws:
            counts.append((2 * rest * draws + total) // (2 * total) if total else 0)  # round(rest · draws / total)
            rest, total = rest - counts[-1], total - draws
        return counts

    def _dealt(self, index: int) -> tuple[int, int]:
        """(cache, its which draw of the epoch) of row number `index`."""
        before, after = self._counts(index), self._counts(index + 1)
        source = next(number for number, count in enumerate(before) if after[number] > count)
        return source, before[source]

    @staticmethod
    def _rows_of(order: RowOrder, drawn: Sequence[int]) -> Indices:
        """Rows by their draw, counted over all epochs: after every row was drawn, the cache's own next epoch begins."""
        epoch_N, index_N = np.divmod(np.array(drawn, dtype=np.int64), order.rows)
        rows_N = np.empty(len(drawn), dtype=np.int64)
        for epoch in np.unique(epoch_N).tolist():
            rows_N[epoch_N == epoch] = order.rows_at(epoch, index_N[epoch_N == epoch])
        return rows_N
