"""Everything that one cache stores of its teacher: its logits, their boundary mass, and what it holds of layers.

`LAYER_KINDS` is the one place where kinds of layer targets are dispatched, as `KINDS` is for logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from teachercache.errors import CacheError
from teachercache.targets.coding.columns import Column
from teachercache.targets.layers.attention_maps import AttentionMaps
from teachercache.targets.layers.attention_relations import QueriesKeys, Relations
from teachercache.targets.layers.hidden_states import HiddenStates
from teachercache.targets.layers.kind import LayerKind
from teachercache.targets.layers.layer_file import LayerFile, no_layer_file
from teachercache.targets.logits.boundary_mass import BOUNDARY_MASS, BoundaryMass
from teachercache.targets.logits.boundary_mass import SECTION as BOUNDARY
from teachercache.targets.logits.kind import TargetKind, calibrates

# Section of `targets` in a manifest, and kind in it.
LAYER_KINDS: dict[tuple[str, str], Callable[[Mapping[str, Any]], LayerKind]] = {
    ("hidden", "hidden"): HiddenStates.from_settings,
    ("attention", "relations"): Relations.from_settings,
    ("attention", "queries-keys"): QueriesKeys.from_settings,
    ("attention", "maps"): AttentionMaps.from_settings,
}
SECTIONS = ("hidden", "attention")
LOGITS = "logits"


def is_known(section: str, settings: Any) -> bool:
    """Whether this version can read such targets."""
    return section in (LOGITS, BOUNDARY, *SECTIONS)


@dataclass(frozen=True, eq=False)
class StoredTargets:
    """The kinds of one cache; immutable, picklable. `of_logits` is None where it stores none."""

    of_logits: TargetKind | None
    hidden: HiddenStates | None = None
    attention: Any = None  # a kind of attention, or None
    boundary: BoundaryMass | None = None

    @classmethod
    def of(cls, targets: Mapping[str, Any], logits: TargetKind | None, *, vocabulary_size: int) -> StoredTargets:
        """From a manifest's `targets` and its kind of logits, if any. Raises `CacheError` for kinds of a later version."""
        kinds = {section: layer_kind(section, targets[section]) for section in SECTIONS if section in targets}
        of_boundary = targets.get(BOUNDARY)  # caches of earlier versions have none
        boundary = of_boundary and BoundaryMass.from_settings(of_boundary, vocabulary_size=vocabulary_size)
        return cls(logits, **kinds, boundary=boundary)  # type: ignore[arg-type]  # the section says which

    @property
    def logits(self) -> TargetKind:
        """How next-token distributions are read. Raises `CacheError` for a cache that stores none."""
        if self.of_logits is None:
            raise CacheError(
                f"the cache stores no logits, only {', '.join(self.sections) or 'tokens'}; use a cache that has them, or "
                "precompute one with targets.logits"
            )
        return self.of_logits

    @property
    def layers(self) -> tuple[LayerKind, ...]:
        """Kinds of layer targets, in the order in which shards store their columns."""
        return tuple(kind for kind in (self.hidden, self.attention) if kind is not None)

    @property
    def columns(self) -> tuple[Column, ...]:
        """Payload columns, in the order in which shards store them."""
        return tuple(column for kind in self.sections.values() for column in kind.columns)

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """Hidden states that must be recorded."""
        return tuple(sorted({layer for kind in self.layers for layer in kind.hidden_layers}))

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Attention that must be recorded."""
        return tuple(sorted({layer for kind in self.layers for layer in kind.attention_layers}))

    @property
    def needs_layer_file(self) -> bool:
        """Whether some kind is read by a layer file: by arrays in it, or by how it says that attention forms scores."""
        return bool(self.layers)

    @property
    def needs_preparation(self) -> bool:
        """Whether the teacher must write a basis or a layer file before anything is captured."""
        return calibrates(self.of_logits) or self.needs_layer_file

    @property
    def calibration_positions(self) -> int:
        """Size of the sample that basis and layer file are made from."""
        sizes = [getattr(kind, "calibration_positions", 0) for kind in (self.of_logits, *self.layers)]
        return max(sizes)

    @property
    def token_bytes(self) -> float:
        """About what the layers of a token take on disk."""
        return sum(kind.token_bytes for kind in self.layers)

    def settings(self) -> dict[str, Any]:
        """What the manifest keeps, by section."""
        return {section: kind.settings() for section, kind in self.sections.items()}

    def describe(self) -> str:
        """One line for people."""
        return "; ".join(kind.describe() for kind in self.sections.values())

    @property
    def sections(self) -> dict[str, TargetKind | BoundaryMass | LayerKind]:
        """What is stored, by section of `targets`, in the order of columns."""
        kinds = {
            LOGITS: self.of_logits,
            BOUNDARY: self.boundary,
            **dict(zip(SECTIONS, (self.hidden, self.attention), strict=True)),
        }
        return {section: kind for section, kind in kinds.items() if kind is not None}

    def with_logits(self, logits: TargetKind) -> StoredTargets:
        """The same with a kind of logits that has its basis."""
        return replace(self, of_logits=logits)

    def with_layer_file(
        self, section: str, layers: LayerFile, *, longest: int, name: Path | str = "the layer file"
    ) -> StoredTargets:
        """The same, the layers of a section ready to capture and to read, for rows of up to `longest` tokens; raises
        `CacheDamaged` for a file of other layers."""
        [kind] = [kind for kind in self.layers if kind.section == section]
        try:
            for table, values in layers.arrays.items():
                if table.endswith((".cos", ".sin")) and len(values) < longest:
                    raise ValueError(f"{table} is for {len(values)} tokens, rows have up to {longest}")
            return replace(self, **{section: kind.with_layers(layers)})  # type: ignore[arg-type]  # one of `SECTIONS`
        except (ValueError, KeyError, TypeError) as error:
            raise no_layer_file(name, error) from None

    def capture(
        self, torch: Any, logits_NV: Any, labels_N: Any, hidden_ND: Any = None, seeds_N: Any = None
    ) -> dict[str, NDArray[Any]]:
        """What is taken of N positions while their logits are at hand, which are overwritten; as `TargetKind.capture`."""
        # First: they are whole until then.
        mass = {} if self.boundary is None else self.boundary.log_masses(torch, logits_NV)
        return self.logits.capture(torch, logits_NV, labels_N, hidden_ND, seeds_N, beside=mass)

    def is_usable(self, captured: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """Which positions hold numbers that a student can learn from, bool [N]."""
        usable_N = self.logits.is_usable(captured)
        return usable_N if self.boundary is None else usable_N & self.boundary.is_usable(captured)

    def finish(self, captured: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """One row's captured arrays, in order of positions, to the columns of its logits and their boundary mass."""
        of_logits = {name: values for name, values in captured.items() if name != BOUNDARY_MASS}
        return self.logits.finish(of_logits) | ({} if self.boundary is None else self.boundary.finish(captured))

    def decoded(self, stored: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """One row's columns, those that are there and are not its logits', as arrays ready for a batch: of layers [S, …], by
        pair [P, …]; `boundary_log_mass` float32 [N]."""
        arrays = {} if self.boundary is None else self.boundary.decoded(stored)
        return arrays | {name: values for kind in self.layers for name, values in kind.decoded(stored).items()}

    def check_stored(self, stored: Mapping[str, NDArray[Any]]) -> None:
        """Raise `CacheDamaged` where a row's columns, those that are there, cannot be."""
        if self.of_logits is not None:
            self.of_logits.check_stored(stored)
        for kind in self.layers:
            kind.check_stored(stored)


def layer_kind(section: str, settings: Mapping[str, Any]) -> LayerKind:
    """The kind that a manifest's section describes; raises `CacheError` for one of a later version."""
    name = str(settings.get("kind", section))
    if (section, name) not in LAYER_KINDS:
        known = ", ".join(kind for place, kind in LAYER_KINDS if place == section)
        raise CacheError(
            f"this cache stores {section} of kind {name!r}, which this version of teachercache cannot read (it reads: "
            f"{known}); install a newer version"
        )
    return LAYER_KINDS[section, name](settings)


def section_of(column: str) -> str | None:
    """The section of targets that a column belongs to, by its name: `hidden_8`, `map_keys_8`; None for logits."""
    if column == BOUNDARY_MASS:
        return BOUNDARY
    what, _, layer = column.rpartition("_")
    if not layer.isdigit():
        return None
    return (
        "hidden" if what == "hidden" else "attention" if what in ("query", "key", "value", "map", "map_keys") else None
    )
