"""Positions with different numbers of tokens: flat on disk, padded in a batch.

On disk a position's tokens follow those of the one before, and a column of sizes tells them apart. In a batch every
position has k places, its own tokens first; what fills the others is the caller's to say.

Shapes: N positions, k places, E tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teachercache.errors import CacheDamaged

Array = NDArray[Any]


MOST_PLACES = 2**28  # of a row in a batch


def check_sizes(stored: Mapping[str, Array], sizes: str, columns: Iterable[str]) -> None:
    """Raise `CacheDamaged` unless each of these ragged columns, where it is there, has the tokens that `sizes` counts."""
    counted = int(stored[sizes].sum(dtype=np.int64)) if sizes in stored else None
    for name in columns:
        if name in stored and counted is not None and len(stored[name]) != counted:
            raise CacheDamaged(f"column {name}: a row has {len(stored[name])} tokens, its {sizes} add up to {counted}")


def places(sizes_N: Array, k: int) -> Array:
    """Marks those of the k places that hold a token, bool [N, k]. Raises `CacheDamaged` for sizes outside 1 … k."""
    if len(sizes_N) * k > MOST_PLACES:
        raise CacheDamaged(
            f"{len(sizes_N)} positions of {k} places are more than a row can have; fetch the cache again"
        )
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
