"""A keyed pseudo-random permutation of 0 … size-1, computed where it is asked for: no table, O(1) memory.

The construction is the swap-or-not shuffle (Hoang, Morris & Rogaway, "An Enciphering Scheme Based on a Card Shuffle",
CRYPTO 2012): each round pairs x with (K - x) mod size and swaps the pair if a keyed bit of the pair says so. It works
on any size directly, where a Feistel network would have to walk cycles through the next power of two. 1 µs an index
in bulk, but half a millisecond for a single one: so neighbours are sent in blocks, and the blocks that a run is in are kept.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
from numpy.typing import NDArray

# Every round halves what is left of the structure; 64 leave none that a test can see at any size.
ROUNDS = 64
BLOCK = 1024  # indices that are sent at once


def order_key(fingerprint: str, *, seed: int, epoch: int, part: str = "") -> bytes:
    """The key of one epoch's order, or of a part of it."""
    return hashlib.blake2b(f"{fingerprint}/{seed}/{epoch}{part}".encode(), digest_size=32).digest()


def permuted(index_N: NDArray[np.int64], *, size: int, key: bytes) -> NDArray[np.int64]:
    """Returns each index's place under the permutation that belongs to `key`, [N]; all of them lie in 0 … size-1."""
    index_N = np.asarray(index_N, dtype=np.int64)
    if size < 1 or (index_N.size and (index_N.min() < 0 or index_N.max() >= size)):
        raise IndexError(f"indices must lie in 0 … {size - 1}")
    if not index_N.size:
        return index_N.copy()
    first, last = int(index_N.min()) // BLOCK, int(index_N.max()) // BLOCK
    if last > first + 1:
        return _sent(index_N, size, key)
    sent = [_block(block, size, key) for block in range(first, last + 1)]
    return np.concatenate(sent)[index_N - first * BLOCK]


@functools.lru_cache(maxsize=16)
def _block(block: int, size: int, key: bytes) -> NDArray[np.int64]:
    return _sent(np.arange(block * BLOCK, min((block + 1) * BLOCK, size), dtype=np.int64), size, key)


def _sent(x_N: NDArray[np.int64], size: int, key: bytes) -> NDArray[np.int64]:
    for pivot, salt in _rounds(key, size):
        partner_N = (pivot - x_N) % size
        swap_N = _bits(np.maximum(x_N, partner_N), salt)  # the larger one names the pair, whichever of them x is
        x_N = np.where(swap_N, partner_N, x_N)
    return x_N


@functools.lru_cache(maxsize=16)
def _rounds(key: bytes, size: int) -> tuple[tuple[np.int64, np.uint64], ...]:
    words = np.frombuffer(hashlib.shake_256(key).digest(16 * ROUNDS), dtype="<u8").reshape(ROUNDS, 2)
    return tuple((np.int64(int(pivot) % size), np.uint64(salt)) for pivot, salt in words)


def _bits(x_N: NDArray[np.int64], salt: np.uint64) -> NDArray[np.bool_]:
    """One well mixed bit for each x: the finaliser of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014)."""
    z_N = np.atleast_1d(x_N).astype(np.uint64) ^ salt
    z_N = (z_N ^ (z_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z_N = (z_N ^ (z_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z_N >> np.uint64(63)).astype(np.bool_).reshape(x_N.shape)
