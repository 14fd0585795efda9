"""Short rows of a micro-batch in one sequence, isolated from each other: a student spends no time on padding.

The cache stays as it is; what is packed is decided a micro-batch at a time, so that rows, order and loss do not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from teachercache.tokens.rows import Segment, TokenRow


def first_fit(lengths: Sequence[int], *, longest: int) -> list[list[int]]:
    """Indices in bins of at most `longest` tokens (one that is longer makes a bin): first-fit decreasing.

    At most 11/9 of the fewest bins possible, plus one (Dósa, 2007).
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        fitting = next((number for number, left in enumerate(room) if left >= lengths[index]), None)
        if fitting is None:
            bins.append([])
            room.append(longest)
            fitting = len(bins) - 1
        bins[fitting].append(index)
        room[fitting] -= lengths[index]
    return bins


def merged(rows: Sequence[TokenRow]) -> TokenRow:
    """Rows one after the other, their segments with them; positions restart at each. For a forward pass alone: it has no id."""
    starts = np.cumsum([0, *(row.length for row in rows)])
    segments = [
        replace(segment, start=segment.start + int(start))
        for start, row in zip(starts, rows, strict=False)
        for segment in row.segments or (Segment("", 0, 0, 0, 0),)
    ]
    ids_S, mask_S = (np.concatenate([getattr(row, name) for row in rows]) for name in ("input_ids_S", "target_mask_S"))
    return TokenRow("", False, ids_S, mask_S, tuple(segments))
