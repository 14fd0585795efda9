"""What is stored of a teacher, as math.

A target *kind* is one file here. It says which columns it stores (`columns`), how they are taken from logits (`capture`
and `finish`; the only places that meet torch, which enters as an argument), how they become arrays of a batch (`decoded`)
and how these are a distribution at any temperature (`softened`). `KINDS` is the one place where kinds are dispatched; the
manifest's `targets` holds the settings that rebuild a kind. kind.py writes down what each provides.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from teachercache.errors import CacheError
from teachercache.targets.basis import SketchBasis
from teachercache.targets.boundary import BoundaryMass
from teachercache.targets.columns import Column
from teachercache.targets.full import Full
from teachercache.targets.head_sketch import HeadSketch
from teachercache.targets.hidden import Hidden
from teachercache.targets.kind import CalibratedKind, TargetKind, calibrates
from teachercache.targets.layer_file import LayerFile
from teachercache.targets.random_sampling import RandomSampling
from teachercache.targets.softened import Softened, TailPolicy
from teachercache.targets.states import HiddenStates
from teachercache.targets.stored import StoredTargets
from teachercache.targets.temperature import grid_index
from teachercache.targets.top_k import TopK
from teachercache.targets.top_p import TopP

_ALL: tuple[type[TargetKind], ...] = (TopK, TopP, RandomSampling, Full, Hidden, HeadSketch)
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


__all__ = [
    "KINDS",
    "BoundaryMass",
    "CalibratedKind",
    "Column",
    "Full",
    "HeadSketch",
    "Hidden",
    "HiddenStates",
    "LayerFile",
    "RandomSampling",
    "SketchBasis",
    "Softened",
    "StoredTargets",
    "TailPolicy",
    "TargetKind",
    "TopK",
    "TopP",
    "calibrates",
    "grid_index",
    "target_kind",
]
