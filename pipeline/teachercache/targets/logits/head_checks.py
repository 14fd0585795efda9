"""Checks of a position's head: it has every token once, and logits that do not rise.

A loss adds up a head's probabilities and takes its first token for the teacher's choice: a token that stands there twice
counts twice, and heads that rise give another first choice. Both are checked in every row that is read, which
costs one sort of its ids.

Shapes: N positions, k places, E tokens of a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from teachercache.errors import CacheDamaged

Array = NDArray[Any]


def check_distinct(ids_Nk: Array, *, name: str) -> None:
    """Raise `CacheDamaged` where a position has a token twice."""
    if _any_place(np.equal, np.sort(ids_Nk, axis=-1)):
        raise CacheDamaged(f"column {name}: a position has a token twice")


def check_falling(logits_Nk: Array, *, name: str) -> None:
    """Raise `CacheDamaged` where logits, which are at most 0, rise from one place of a position to the next."""
    if _any_place(np.less, _magnitudes(logits_Nk)):
        raise CacheDamaged(f"column {name}: the logits of a position rise")


def check_ragged(sizes_N: Array, *, ids_E: Array | None, logits_E: Array | None) -> None:
    """The same of positions with different numbers of tokens, for the columns that are there. `sizes_N` add up to E, and were
    found to be possible."""
    held_Nk = np.arange(int(sizes_N.max(initial=0))) < sizes_N[:, None]
    entries = np.count_nonzero(held_Nk)
    if logits_E is not None and len(logits_E) == entries:
        lowest = np.array(-np.inf, logits_E.dtype)
        check_falling(_padded(logits_E, held_Nk, np.broadcast_to(lowest, held_Nk.shape)), name="head_logits")
    if ids_E is not None and len(ids_E) == entries:
        others_k = -1 - np.arange(held_Nk.shape[1], dtype=np.int32)  # no token's, and each once
        check_distinct(
            _padded(ids_E.astype(np.int32), held_Nk, np.broadcast_to(others_k, held_Nk.shape)), name="head_ids"
        )


def _any_place(compare: np.ufunc, values_Nk: Array) -> bool:
    """Tells whether a value and the one before it in its position compare so anywhere. All of them are compared in one
    run, also the first of a position with the last of the one before, which does not count: rows of k are too short to
    be quick."""
    k = values_Nk.shape[1]
    if k < 2:
        return False
    flat = values_Nk.ravel()
    matches = compare(flat[1:], flat[:-1])
    matches[k - 1 :: k] = False
    return bool(matches.any())


def _padded(flat_E: Array, held_Nk: Array, others_Nk: Array) -> Array:
    values_Nk = others_Nk.copy()
    values_Nk[held_Nk] = flat_E
    return values_Nk


def _magnitudes(logits: Array) -> Array:
    """The bits of floats up to 0, which rise as they fall: numpy compares 16-bit floats one by one."""
    return np.ascontiguousarray(logits).view(f"<u{logits.dtype.itemsize}")
