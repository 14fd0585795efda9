"""Random numbers that belong to a position, whatever batch it runs in: a counter-based generator.

A position's seed follows from its row's id and its place in the row. Number j of a position is the hash of seed and j, so
that there is no state to carry from block to block.

Source: Steele, Lea & Flood, "Fast splittable pseudorandom number generators", 2014 (the finaliser of SplitMix64).
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def position_seeds(row_id: str, positions: int) -> Array:
    """Seeds of a row's positions, uint64 [N]."""
    digest = hashlib.blake2b(row_id.encode(), digest_size=8, salt=b"draws").digest()
    return _mix(np.frombuffer(digest, dtype="<u8") + np.arange(positions, dtype=np.uint64) * GOLDEN)


def uniforms(seeds_N: Array, draws: int) -> Array:
    """Numbers in (0, 1), float64 [N, draws], in steps of 2^-32: never 0 or 1."""
    mixed_Nd = _mix(seeds_N[:, None] + np.arange(1, draws + 1, dtype=np.uint64) * GOLDEN)
    return ((mixed_Nd >> np.uint64(32)) + 0.5) / 2.0**32


def _mix(values: Array) -> Array:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Array = values ^ (values >> np.uint64(31))
    return mixed
