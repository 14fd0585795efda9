"""`Each`: how work is done on every one of many items. Here in turn; on a cluster, `engine.cluster.on_cluster`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Each(Protocol):
    """Does work on items that know nothing of each other; the results come in the order of the items."""

    def __call__(self, work: Callable[[Item], Result], items: Sequence[Item], /) -> Iterator[Result]:
        """The results, as they are drawn."""


def in_turn(work: Callable[[Item], Result], items: Sequence[Item], /) -> Iterator[Result]:
    """In this process, one after the other."""
    return map(work, items)
