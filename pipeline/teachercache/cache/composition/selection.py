"""Selection: which rows of which shards of some parents a composed cache holds, as parts in their order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from teachercache.cache.composition.row_facts import ids_of
from teachercache.cache.files.entries import ShardInfo
from teachercache.cache.reader import Cache

Progress = Callable[[], None]  # called once for each shard that was looked at


@dataclass(frozen=True, eq=False)
class Part:
    """A shard of a parent, by their numbers; `rows` marks those that are taken, None means all."""

    parent: int
    shard: int
    rows: NDArray[np.bool_] | None = None

    @classmethod
    def of(cls, parent: int, shard: int, rows: NDArray[np.bool_]) -> Part:
        """A part with the marked rows."""
        return cls(parent, shard, None if rows.all() else rows)

    @property
    def is_empty(self) -> bool:
        """Tells whether no row is taken."""
        return self.rows is not None and not self.rows.any()

    def info(self, parents: Sequence[Cache]) -> ShardInfo:
        """The entry of its shard."""
        return parents[self.parent].infos[self.shard]


def all_parts(parents: Sequence[Cache]) -> list[Part]:
    """Every shard of all parents, whole."""
    return [Part(number, shard) for number, cache in enumerate(parents) for shard in range(len(cache.infos))]


def without_repeated(parents: Sequence[Cache], *, seen: Progress) -> list[Part]:
    """Every shard of all parents, without rows that came before; a row is known by its id. Takes 40 bytes of memory a row."""
    parts = all_parts(parents)
    found = []
    for part in parts:
        found.append(ids_of(parents[part.parent], part.info(parents)))
        seen()
    is_first = _first_of_each(np.concatenate(found) if found else np.empty(0, "V16"))
    marks = np.split(is_first, np.cumsum([len(ids) for ids in found])[:-1])
    return [Part.of(part.parent, part.shard, rows) for part, rows in zip(parts, marks, strict=True)]


def _first_of_each(ids: NDArray[np.void]) -> NDArray[np.bool_]:
    """Marks ids that did not come before."""
    halves = ids.view(">u8").reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: of equal ones the first stays first
    in_order = halves[order]
    is_first = np.ones(len(ids), np.bool_)
    is_first[order[1:]] = (in_order[1:] != in_order[:-1]).any(-1)
    return is_first
