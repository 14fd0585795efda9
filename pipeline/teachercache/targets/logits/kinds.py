"""The kinds of next-token targets that this version knows, by the names that manifests and recipes give them.

Another kind is a file beside this and a line here; from outside the package, `KINDS.register(Kind)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from teachercache.errors import CacheError
from teachercache.registry import Registry
from teachercache.section import one_of
from teachercache.targets.logits.basis import SketchBasis
from teachercache.targets.logits.final_hidden import FinalHidden
from teachercache.targets.logits.full import Full
from teachercache.targets.logits.head_sketch import HeadSketch
from teachercache.targets.logits.kind import KindSettings, TargetKind, calibrates
from teachercache.targets.logits.random_sampling import RandomSampling
from teachercache.targets.logits.top_k import TopK
from teachercache.targets.logits.top_p import TopP

KINDS: Registry[type[TargetKind]] = Registry(
    "kind of logit targets",
    (TopK, TopP, RandomSampling, Full, FinalHidden, HeadSketch),
    name_of=lambda kind: str(kind.kind),
)
DEFAULT = HeadSketch  # of a recipe that says no kind


def kind_settings(name: str) -> type[KindSettings] | None:
    """The class of a kind's settings in a recipe; None for a kind that nobody has."""
    kind = KINDS.get(name)
    return None if kind is None else cast(type[KindSettings], kind.config)


def _added_settings() -> dict[str, type[KindSettings]]:
    return {str(kind.kind): cast(type[KindSettings], kind.config) for kind in KINDS.added}


def _kind_of(values: Any) -> str:
    default = DEFAULT.kind
    return str(values.get("kind", default) if isinstance(values, dict) else getattr(values, "kind", default))


if TYPE_CHECKING:
    LogitsConfig = KindSettings
else:  # the default first, as documentation shows them
    _OWN = sorted(KINDS.own, key=lambda kind: kind is not DEFAULT)
    LogitsConfig = one_of({kind.kind: kind.config for kind in _OWN}, tag_of=_kind_of, added=_added_settings)


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
