"""The kinds of next-token targets that this version knows, by the names that manifests and recipes give them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from teachercache.errors import CacheError
from teachercache.targets.logits.basis import SketchBasis
from teachercache.targets.logits.final_hidden import FinalHidden
from teachercache.targets.logits.full import Full
from teachercache.targets.logits.head_sketch import HeadSketch
from teachercache.targets.logits.kind import TargetKind, calibrates
from teachercache.targets.logits.random_sampling import RandomSampling
from teachercache.targets.logits.top_k import TopK
from teachercache.targets.logits.top_p import TopP

_ALL: tuple[type[TargetKind], ...] = (TopK, TopP, RandomSampling, Full, FinalHidden, HeadSketch)
KINDS = {str(kind.kind): kind for kind in _ALL}


def target_kind(settings: Mapping[str, Any], *, vocabulary_size: int, basis: Path | None = None) -> TargetKind:
    """The target kind that a manifest or a recipe describes, e.g. `{"kind": "top-k", "k": 64, …}`.

    `basis` is the file by which kinds that calibrate are read; without it they know their columns alone. Raises `CacheError`
    for a kind of a later version, `CacheDamaged` when the file is no basis.
    """
    kind = KINDS.get(settings.get("kind", ""))
    if kind is None:
        raise CacheError(
            f"this cache stores targets of kind {settings.get('kind')!r}, which this version of teachercache cannot read "
            f"(it reads: {', '.join(KINDS)}); install a newer version"
        )
    described = kind.from_settings(settings, vocabulary_size=vocabulary_size)
    return described.with_basis(SketchBasis.load(basis)) if basis and calibrates(described) else described
