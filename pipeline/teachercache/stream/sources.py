"""The caches of a run, as everything after them asks for them: in order, the first one with what an epoch is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from teachercache.errors import CacheError
from teachercache.shards import Cache
from teachercache.shards.writer import BATCH_BYTES
from teachercache.stream.mixture import Mixture
from teachercache.stream.windows import WINDOW, RowOrder

MOST_BLOCKS = 4096  # of a shard


@dataclass(frozen=True)
class Mixed:
    """A further cache, and its share of the rows in training (None: its rows come as often as those of the first)."""

    cache: Cache
    share: float | None = None


def train_order(cache: Cache, mix: Sequence[Mixed] = (), *, seed: int, window: int = WINDOW) -> Mixture:
    """The order of the train rows of a run. Raises `RecipeError` for impossible shares."""
    orders = [_row_order(each, seed=seed, window=window) for each in (cache, *(mixed.cache for mixed in mix))]
    return Mixture.of(orders, shares=[mixed.share for mixed in mix])


def check_mix(cache: Cache, mix: Sequence[Mixed]) -> None:
    """Raise `CacheError` where caches cannot be learned from together: their ids must mean the same text."""
    for mixed in mix:
        if mixed.cache.manifest.tokenizer_fingerprint != cache.manifest.tokenizer_fingerprint:
            raise CacheError(
                f"stream.mix: {mixed.cache.name} has another tokenizer than {cache.name}, so their ids mean different "
                "text; mix caches of one tokenizer"
            )
        if mixed.cache.manifest.fingerprint == cache.manifest.fingerprint:
            raise CacheError(f"stream.mix: {mixed.cache.name} is the same cache as {cache.name}; take it out")


def _row_order(cache: Cache, *, seed: int, window: int) -> RowOrder:
    shards = cache.manifest.shards
    # About as many rows as a record batch has; the number of blocks stays bounded whatever a manifest says.
    blocks = [min(max(1, shard.bytes // BATCH_BYTES), MOST_BLOCKS) for shard in shards]
    return RowOrder(
        np.array([shard.rows - shard.held_out_rows for shard in shards], dtype=np.int64),
        block_rows=[math.ceil(max(1, shard.rows) / count) for shard, count in zip(shards, blocks, strict=True)],
        fingerprint=cache.manifest.fingerprint,
        seed=seed,
        window=window,
    )
