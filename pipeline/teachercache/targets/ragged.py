"""Positions with different numbers of tokens: flat on disk, padded in a batch.

On disk a position's tokens follow those of the one before, and a column of sizes tells them apart. In a batch every
position has k places, its own tokens first; what fills the others is the caller's to say.

Shapes: N positions, k places, E tokens of a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from teachercache.errors import CacheDamaged

Array = NDArray[Any]


def places(sizes_N: Array, k: int) -> Array:
    """Which of the k places hold a token, bool [N, k]. Raises `CacheDamaged` for sizes outside 1 … k."""
    if len(sizes_N) and not 1 <= sizes_N.min() <= sizes_N.max() <= k:
        raise CacheDamaged(
            f"a position has {sizes_N.min()} or {sizes_N.max()} tokens, between 1 and {k} are possible; fetch the cache again"
        )
    return np.arange(k) < sizes_N[:, None]


def spread(flat_E: Array, held_Nk: Array, *, fill: Any, dtype: Any) -> Array:
    """Tokens to their places, [N, k]; `fill` (a number, or [N, 1]) stands in the others.

    Raises `CacheDamaged` when there are more or fewer tokens than places that hold one.
    """
    if len(flat_E) != np.count_nonzero(held_Nk):
        raise CacheDamaged(
            f"a row has {len(flat_E)} tokens, its sizes add up to {np.count_nonzero(held_Nk)}; fetch the cache again"
        )
    values_Nk = np.empty(held_Nk.shape, dtype=dtype)
    values_Nk[...] = fill
    values_Nk[held_Nk] = flat_E
    return values_Nk


def spread_ids(flat_E: Array, held_Nk: Array) -> Array:
    """Token ids to their places, int32 [N, k]; padding repeats a position's first id (softened.py)."""
    ids_Nk = spread(flat_E, held_Nk, fill=0, dtype=np.int32)
    return np.where(held_Nk, ids_Nk, ids_Nk[:, :1])
