"""Batches of the teacher: chooses the rows that share a forward pass.

Rows of similar length go together, so that padding stays small. The batches of a unit are a function of its rows alone:
the number of actors, and which of them runs a unit, change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from teachercache.tokens.rows import TokenRow


def length_sorted_batches(rows: Sequence[TokenRow], *, positions_per_batch: int) -> list[list[int]]:
    """Indices of `rows` in batches whose padded size (rows x longest) stays within `positions_per_batch`.

    Longest first, so that a batch that does not fit into memory shows at once. A single row always makes a batch.
    """
    order = sorted(range(len(rows)), key=lambda index: (-rows[index].length, rows[index].row_id))
    batches: list[list[int]] = []
    longest = 0
    for index in order:
        if not batches or (len(batches[-1]) + 1) * longest > positions_per_batch:
            batches.append([])
            longest = rows[index].length
        batches[-1].append(index)
    return batches
