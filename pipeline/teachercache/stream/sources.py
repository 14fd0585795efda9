"""The caches of a run, as everything after them asks for them: in order, the first one with what an epoch is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from teachercache.cache import Cache
from teachercache.cache.shards.writer import BATCH_BYTES
from teachercache.errors import CacheError
from teachercache.stream.order.mixture import Mixture
from teachercache.stream.order.shuffle_windows import WINDOW, RowOrder
from teachercache.stream.withheld import Trained

MOST_BLOCKS = 2**18  # of a window
TOKEN_BYTES = 10  # of a token's id, mask and text, decompressed
TRAINED_TOKEN_BYTES = 5  # of these, what training reads


@dataclass(frozen=True)
class Mixed:
    """A further cache, and its share of the rows in training (None: its rows come as often as those of the first)."""

    cache: Cache
    share: float | None = None


def train_order(
    cache: Cache, mix: Sequence[Mixed] = (), *, seed: int, window: int = WINDOW, trained: Trained | None = None
) -> Mixture:
    """The order of the train rows of a run, by default of all that its caches have, else of `trained` ones (numbered among
    themselves, as a `CacheDataset` numbers them). Raises `RecipeError` for impossible shares."""
    caches = [cache, *(mixed.cache for mixed in mix)]
    counts = [(trained or Trained(())).of_shards(number, source) for number, source in enumerate(caches)]
    orders = [_row_order(source, rows, seed=seed, window=window) for source, rows in zip(caches, counts, strict=True)]
    return Mixture.of(orders, shares=[mixed.share for mixed in mix])


def check_mix(cache: Cache, mix: Sequence[Mixed]) -> None:
    """Raise `CacheError` where caches cannot be learned from together: their ids must mean the same text, and their rows
    must begin alike."""
    met = {cache.manifest.fingerprint: cache.name}
    firsts = {_is_of_chats(cache): cache}
    for mixed in mix:
        manifest, name = mixed.cache.manifest, mixed.cache.name
        if manifest.tokenizer_fingerprint != cache.manifest.tokenizer_fingerprint:
            raise CacheError(
                f"stream.mix: {name} has another tokenizer than {cache.name}, so their ids mean different text; mix caches "
                "of one tokenizer"
            )
        if manifest.task != cache.manifest.task:
            raise CacheError(
                f"stream.mix: {name} is of the task {manifest.task['name']}, {cache.name} of {cache.task.name}; mix "
                "caches of one task"
            )
        if manifest.fingerprint in met:
            raise CacheError(f"stream.mix: {name} is the same cache as {met[manifest.fingerprint]}; take it out")
        if not mixed.cache.rows_of("train"):
            raise CacheError(f"stream.mix: {name} has no rows to train on; take it out")
        met[manifest.fingerprint] = name
        _check_beginnings(firsts.setdefault(_is_of_chats(mixed.cache), mixed.cache), mixed.cache)


def _check_beginnings(one: Cache, other: Cache) -> None:
    """Raise `CacheError` where rows of two caches, both of texts or both of conversations, begin otherwise. Of one that says
    nothing, and may be of an earlier version, the beginnings are the tokenizer's own, or a warning's matter."""
    manifests = [one.manifest, other.manifest]
    if all("prefix_ids" in manifest.tokenizer for manifest in manifests):
        alike = one.manifest.prefix_ids == other.manifest.prefix_ids
    else:
        alike = not any(manifest.prefix_ids and manifest.row_prefix != "auto" for manifest in manifests)
    if alike:
        return
    first, second = (
        f"{' '.join(map(str, manifest.prefix_ids)) or 'nothing'} (sequence.prefix: {manifest.row_prefix})"
        for manifest in manifests
    )
    raise CacheError(
        f"stream.mix: rows of {one.name} begin with {first}, those of {other.name} with {second}, so a student would not "
        "know how a text begins; precompute them with one sequence.prefix"
    )


def _is_of_chats(cache: Cache) -> bool:
    return bool(cache.manifest.corpus.get("messages_field"))


def windows_bytes(caches: Sequence[Cache], *, window: int, layers: bool) -> int:
    """Bytes of the shards that the caches in object stores need at a time, at most: two windows of each; with `layers` of what
    is stored of these as well."""
    remote = [cache for cache in caches if cache.is_remote]
    sizes = [cache.infos.sizes(None if layers else cache.folders_of(cache.logit_columns)) for cache in remote]
    return sum(int(np.sort(sizes_S)[-2 * window :].sum()) for sizes_S in sizes)


def _row_order(cache: Cache, rows_S: NDArray[np.int64], *, seed: int, window: int) -> RowOrder:
    rows, tokens, sizes = cache.infos.counted("rows"), cache.infos.counted("tokens"), cache.infos.sizes()
    # What a record batch has of targets, or of ids and text where few tokens have targets (`cache.shards.writer`). The number
    # of blocks stays bounded whatever a manifest says.
    loads = np.maximum(sizes, TOKEN_BYTES * tokens // 4) // BATCH_BYTES
    blocks = np.clip(loads, 1, max(1, MOST_BLOCKS // window))
    held = sizes + TRAINED_TOKEN_BYTES * tokens
    return RowOrder(
        rows_S,
        block_rows=-(-np.maximum(1, rows) // blocks),
        block_bytes=-(-np.maximum(1, held) // blocks),
        fingerprint=cache.manifest.fingerprint,
        seed=seed,
        window=window,
    )
