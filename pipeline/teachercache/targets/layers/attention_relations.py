"""Attention as relations, linear in the length of a row: rebuilt from the hidden state that enters the block.

That is stored anyway, or for this; the layer file holds the block's norm, its query and key matrices, and the rotary table.
Values can be kept too, for relations among values (Wang et al., "MiniLMv2", 2021).

Shapes: B rows, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from numpy.typing import NDArray
from pydantic import Field

from teachercache.targets.coding.columns import Column
from teachercache.targets.layers.attention import BlockEntry
from teachercache.targets.layers.attention_factors import PARTS, SHARED, AttentionFactors, FactorsClaim, StoredHeads
from teachercache.targets.layers.claims import LayerClaim
from teachercache.targets.layers.hidden_states import column_of as hidden_column
from teachercache.targets.layers.kind import RowActivations
from teachercache.targets.layers.layer_file import LayerFile
from teachercache.targets.layers.settings import BLOCKS, AttentionSettings, Layers, LayerSettings, TeacherShape

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[Any]


class RelationsConfig(AttentionSettings):
    """Attention rebuilt from the hidden state that enters the block."""

    kind: Literal["relations"] = Field("relations", description="from the hidden state that enters the block")
    layers: Layers = Field(description=BLOCKS)
    values: bool = Field(False, description="keep what relations among values need, too")

    def for_teacher(self, teacher: TeacherShape, *, longest: int) -> dict[str, Any]:
        """See `LayerSettings`."""
        return {**teacher.attention(self.layers), "values": self.values}


class RelationsClaim(FactorsClaim):
    """Settings in a manifest."""

    def check(self, section: str, targets: Mapping[str, Any], *, longest: int) -> None:
        """See `LayerClaim`."""
        super().check(section, targets, longest=longest)
        stored = set((targets.get("hidden") or {}).get("layers", ()))
        if missing := {layer - 1 for layer in self.layers} - stored:
            raise ValueError(f"targets.attention needs hidden state {min(missing)}, which is not stored")


@dataclass(frozen=True, eq=False)
class Relations(AttentionFactors):
    """Attention rebuilt from the hidden state that enters its block."""

    kind: ClassVar[str] = "relations"
    config: ClassVar[type[LayerSettings]] = RelationsConfig
    claim: ClassVar[type[LayerClaim]] = RelationsClaim
    from_hidden: ClassVar[bool] = True
    attention_layers: tuple[int, ...] = ()
    columns: tuple[Column, ...] = ()
    token_bytes: float = 0.0

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Relations:
        """Rebuild from a manifest's settings."""
        return cls(layers=tuple(settings["layers"]), **{name: settings[name] for name in SHARED})

    @classmethod
    def why_unreadable(cls, settings: Mapping[str, Any]) -> str | None:
        """Nothing that it says can be of a later version."""
        return None

    def settings(self) -> dict[str, Any]:
        """Returns the settings that the manifest keeps."""
        return {"kind": self.kind, "layers": list(self.layers), **{name: getattr(self, name) for name in SHARED}}

    def describe(self) -> str:
        """One line for people."""
        return (
            f"attention of blocks {', '.join(map(str, self.layers))} ({self.heads} heads, rebuilt from hidden states)"
        )

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """Layers whose hidden states enter the blocks."""
        return tuple(layer - 1 for layer in self.layers)

    def arrays(self) -> dict[str, tuple[int | None, ...]]:
        """The matrices; norms, biases and tables are there where the teacher has them."""
        return {
            f"attention.{layer}.{part}": (self.part_width(part), self.width)
            for layer in self.layers
            for part in self.parts
        }

    def with_layers(self, layers: LayerFile) -> Relations:
        """The kind, ready to read; raises `ValueError` for arrays that are missing or of other sizes."""
        layers.check(self.arrays())
        for layer in self.layers:
            layers.check({name: shape for name, shape in self._optional(layer).items() if name in layers.arrays})
        shapes = self.shapes_of(layers)
        for layer in self.layers:
            _entry_of(layers, layer)
            _check_rotary(layers, layer, self.head_width)
        return replace(self, layer_file=layers, shapes=shapes, copies={})

    def _optional(self, layer: int) -> dict[str, tuple[int | None, ...]]:
        sizes: dict[str, tuple[int | None, ...]] = {"norm": (self.width,), "norm_bias": (self.width,)}
        sizes |= {f"{part}_bias": (self.part_width(part),) for part in PARTS}
        sizes |= {f"{part}_norm": (self.head_width,) for part in PARTS[:2]}
        sizes |= {"cos": (None, None), "sin": (None, None), "sinks": (self.heads,)}
        return {f"attention.{layer}.{name}": size for name, size in sizes.items()}

    def capture(self, torch: ModuleType, row: RowActivations) -> dict[str, Array]:
        """Nothing but hidden states, which are a kind of their own."""
        return {}

    def decoded(self, stored: Mapping[str, Array]) -> dict[str, Array]:
        """Nothing but hidden states, which are a kind of their own."""
        return {}

    def columns_of(self, layer: int) -> tuple[str, ...]:
        """Columns that a block's attention is read from."""
        return (hidden_column(layer - 1),)

    def stored_heads(
        self, torch: ModuleType, layer: int, arrays: Mapping[str, Tensor], position_BS: Tensor
    ) -> StoredHeads:
        """Queries and keys of a block, from `arrays`: what is decoded of `columns_of`, as [B, S, …]."""
        hidden_BSD = arrays[hidden_column(layer - 1)]
        read_by = self.arrays_of(layer, hidden_BSD)
        assert self.layer_file is not None
        shape = self.shapes[layer]
        entry = _entry_of(self.layer_file, layer)
        queries, keys, values = entry.apply(torch, read_by, hidden_BSD, position_BS, shape)
        return StoredHeads(queries, keys, values, shape, read_by.get("sinks"))


def _entry_of(layers: LayerFile, layer: int) -> BlockEntry:
    described = layers.attention[layer]
    try:
        entry = BlockEntry(**described["entry"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"it does not say how block {layer} makes its queries ({error})") from None
    if entry.norm not in ("rms", "layer", "none") or not all(
        type(number) in (int, float) and 0 <= number < 1 for number in (entry.epsilon, entry.head_epsilon)
    ):
        raise ValueError(f"it says of block {layer} what no norm is")
    if entry.norm != "none" and f"attention.{layer}.norm" not in layers.arrays:
        raise ValueError(f"attention.{layer}.norm is missing")
    return entry


def _check_rotary(layers: LayerFile, layer: int, head_width: int) -> None:
    cos, sin = (layers.arrays.get(f"attention.{layer}.{name}") for name in ("cos", "sin"))
    if cos is None and sin is None:
        return
    if cos is None or sin is None or cos.shape != sin.shape or cos.shape[1] % 2 or not 0 < cos.shape[1] <= head_width:
        raise ValueError(f"the rotary table of block {layer} is none of heads that are {head_width} wide")
