"""Everything that one cache stores of its teacher: its logits, their boundary mass, and what it holds of layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from teachercache.errors import CacheError
from teachercache.targets.coding.columns import Column
from teachercache.targets.layers.kind import AttentionKind, HiddenKind, LayerKind
from teachercache.targets.layers.kinds import SECTIONS, kind_named, layer_kind, unknown_kind
from teachercache.targets.layers.layer_file import LayerFile, no_layer_file
from teachercache.targets.logits.boundary_mass import BOUNDARY_MASS, BoundaryMass
from teachercache.targets.logits.boundary_mass import SECTION as BOUNDARY
from teachercache.targets.logits.kind import TargetKind, calibrates
from teachercache.targets.logits.kinds import KINDS, target_kind

if TYPE_CHECKING:
    from torch import Tensor

LOGITS = "logits"
REMEDY = "install a newer version of teachercache"


def why_unknown(section: str, targets: Mapping[str, Any]) -> str | None:
    """Returns the reason, in a line, why this version cannot read a section of a manifest's `targets`; None where it
    can, or where its settings are those of no version at all."""
    settings = targets[section]
    if section not in (LOGITS, BOUNDARY, *SECTIONS):
        return f"this version cannot read the {section} that the cache stores; {REMEDY}"
    if not isinstance(settings, Mapping):
        return None
    if section in SECTIONS:
        return _why_unknown_layers(section, settings, targets)
    kind = settings.get("kind", "" if section == LOGITS else section)
    known = KINDS if section == LOGITS else (BOUNDARY,)
    if isinstance(kind, str) and kind not in known:  # asks installed extensions too
        remedy = f"{REMEDY}, or the extension that has it" if section == LOGITS else REMEDY
        return f"the cache stores {section} of kind {kind!r}, this version reads {', '.join(known)}; {remedy}"
    return None


def _why_unknown_layers(section: str, settings: Mapping[str, Any], targets: Mapping[str, Any]) -> str | None:
    name = settings.get("kind", section)
    if not isinstance(name, str):
        return None
    kind = kind_named(section, settings)
    if kind is None:
        return unknown_kind(section, name)
    if (later := kind.why_unreadable(settings)) is not None:
        return f"{later}; {REMEDY}"
    if "hidden" in targets and section != "hidden" and getattr(kind, "from_hidden", False):
        return why_unknown("hidden", targets)
    return None


def check_known(section: str, targets: Mapping[str, Any]) -> None:
    """Raise `CacheError` for a section that is there and that this version cannot read."""
    if section in targets and (reason := why_unknown(section, targets)):
        raise CacheError(reason)


@dataclass(frozen=True, eq=False)
class StoredTargets:
    """The kinds of one cache; immutable, picklable. `of_logits` is None where it stores none."""

    of_logits: TargetKind | None
    hidden: HiddenKind | None = None
    attention: AttentionKind | None = None
    boundary: BoundaryMass | None = None
    unknown: Mapping[str, str] = field(default_factory=dict)  # sections that cannot be read, and why

    @classmethod
    def of(cls, targets: Mapping[str, Any], *, vocabulary_size: int, basis: Path | None = None) -> StoredTargets:
        """From a manifest's `targets`; `basis` is the file of kinds of logits that calibrate: without it they know their
        columns alone. Sections and kinds of a later version are `unknown`, until somebody asks for them."""
        unknown = {section: why for section in targets if (why := why_unknown(section, targets))}
        known = {section: settings for section, settings in targets.items() if settings and section not in unknown}
        kinds = {section: layer_kind(section, known[section]) for section in SECTIONS if section in known}
        logits, of_boundary = known.get(LOGITS), known.get(BOUNDARY)
        kind = logits and target_kind(logits, vocabulary_size=vocabulary_size, basis=basis)
        boundary = of_boundary and BoundaryMass.from_settings(of_boundary, vocabulary_size=vocabulary_size)
        return cls(kind, **kinds, boundary=boundary, unknown=unknown)  # type: ignore[arg-type]  # the section says which

    def check_known(self, section: str) -> None:
        """Raise `CacheError` for a section that is there and that this version cannot read."""
        if section in self.unknown:
            raise CacheError(self.unknown[section])

    @property
    def logits(self) -> TargetKind:
        """Reader of next-token distributions. Raises `CacheError` for a cache that stores none, or of a later kind."""
        self.check_known(LOGITS)
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
        """Tells whether some kind is read by a layer file: by arrays in it, or by how it says that attention forms
        scores."""
        return bool(self.layers)

    @property
    def needs_preparation(self) -> bool:
        """Tells whether the teacher must write a basis or a layer file before anything is captured."""
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
        """Returns the settings that the manifest keeps, by section."""
        return {section: kind.settings() for section, kind in self.sections.items()}

    def describe(self) -> str:
        """One line for people."""
        later = [f"{section} of a later version" for section in self.unknown]
        return "; ".join([*(kind.describe() for kind in self.sections.values()), *later])

    @property
    def sections(self) -> dict[str, TargetKind | BoundaryMass | LayerKind]:
        """Kinds that are stored, by section of `targets`, in the order of columns."""
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
        self,
        torch: ModuleType,
        logits_NV: Tensor,
        labels_N: Tensor,
        hidden_ND: Tensor | None = None,
        seeds_N: NDArray[Any] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Takes the targets of N positions while their logits are at hand, which are overwritten; as
        `TargetKind.capture`."""
        # First: they are whole until then.
        mass = {} if self.boundary is None else self.boundary.log_masses(torch, logits_NV)
        return self.logits.capture(torch, logits_NV, labels_N, hidden_ND, seeds_N, beside=mass)

    def is_usable(self, captured: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """Marks the positions whose numbers a student can learn from, bool [N]."""
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
