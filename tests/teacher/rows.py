"""Seeded rows of tokens."""

from __future__ import annotations

import numpy as np

from teachercache.tokens.rows import Segment, TokenRow


def make_row(
    length: int, *, seed: int, starts: tuple[int, ...] = (0,), name: str = "", vocabulary: int = 90
) -> TokenRow:
    """A seeded row of segments that begin at `starts`; the last position of each has no target."""
    ids = np.random.default_rng(seed).integers(0, vocabulary, length).astype(np.int32)
    mask = np.ones(length, dtype=bool)
    mask[-1] = False
    mask[[start - 1 for start in starts if start]] = False
    segments = tuple(Segment(f"{seed:032x}", 0, 0, 0, start) for start in starts)
    return TokenRow(name or f"{seed:032x}", False, ids, mask, segments)
