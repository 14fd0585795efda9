"""What is stored of a teacher, as math.

A target *kind* is one file here. It says which columns it stores per position (`columns`), how they are taken from
logits (`capture`, the only place that meets torch, which enters as an argument) and how a distribution is read back.
`KINDS` is the one place where kinds are dispatched; the manifest's `targets` holds the settings that rebuild a kind.
"""

from __future__ import annotations

from typing import Any

from teachercache.errors import CacheError
from teachercache.targets.columns import Column
from teachercache.targets.softened import Softened, TailPolicy  # before `softened`, the function: a module of that name
from teachercache.targets.temperature import grid_index, softened
from teachercache.targets.top_k import TopK, is_usable

KINDS = {TopK.kind: TopK}


def target_kind(settings: dict[str, Any], *, vocabulary_size: int) -> TopK:
    """The target kind that a manifest or a recipe describes, e.g. `{"kind": "top-k", "k": 64, …}`."""
    kind = KINDS.get(settings.get("kind", ""))
    if kind is None:
        raise CacheError(
            f"this cache stores targets of kind {settings.get('kind')!r}, which this version of teachercache cannot read "
            f"(it reads: {', '.join(KINDS)}); install a newer version"
        )
    return kind.from_settings(settings, vocabulary_size=vocabulary_size)


__all__ = ["KINDS", "Column", "Softened", "TailPolicy", "TopK", "grid_index", "is_usable", "softened", "target_kind"]
