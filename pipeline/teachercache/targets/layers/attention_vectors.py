"""Attention as queries and keys, linear in the length of a row: after rotation, in steps of each channel's own spread.

For architectures whose queries and keys cannot be rebuilt from hidden states. Values can be kept too, for relations among them
(Wang et al., "MiniLMv2", 2021).

Shapes: B rows, S tokens, H heads of queries, K of keys and values, E a head's width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from teachercache.errors import CacheError
from teachercache.targets.coding.columns import Column
from teachercache.targets.coding.pco import NAME as PCO
from teachercache.targets.layers.attention_factors import PARTS, SHARED, AttentionFactors, FactorsClaim, StoredHeads
from teachercache.targets.layers.claims import Count, LayerClaim, Step
from teachercache.targets.layers.kind import RowActivations
from teachercache.targets.layers.layer_file import LayerFile
from teachercache.targets.layers.settings import BLOCKS, AttentionSettings, Layers, LayerSettings, TeacherShape

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[Any]


class QueriesKeysConfig(AttentionSettings):
    """Queries and keys as they enter the scores."""

    kind: Literal["queries-keys"] = Field("queries-keys", description="queries and keys themselves")
    layers: Layers = Field(description=BLOCKS)
    values: bool = Field(False, description="keep what relations among values need, too")
    step: float = Field(0.03, gt=0, le=1000, description="quantisation step, in units of a channel's spread")
    calibration_positions: int = Field(4096, ge=64, description="tokens that give spreads")

    def for_teacher(self, teacher: TeacherShape, *, longest: int) -> dict[str, Any]:
        """See `LayerSettings`."""
        kept = {name: getattr(self, name) for name in ("values", "step", "calibration_positions")}
        return {**teacher.attention(self.layers), **kept}


class QueriesKeysClaim(FactorsClaim):
    """Settings in a manifest."""

    step: Step
    calibration_positions: Count


@dataclass(frozen=True, eq=False)
class QueriesKeys(AttentionFactors):
    """Queries and keys as they enter the scores. `step` is in units of a channel's spread."""

    kind: ClassVar[str] = "queries-keys"
    config: ClassVar[type[LayerSettings]] = QueriesKeysConfig
    claim: ClassVar[type[LayerClaim]] = QueriesKeysClaim
    from_hidden: ClassVar[bool] = False
    hidden_layers: tuple[int, ...] = ()
    step: float = 0.0
    calibration_positions: int = 0

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> QueriesKeys:
        """Rebuild from a manifest's settings."""
        names = (*SHARED, "step", "calibration_positions")
        return cls(layers=tuple(settings["layers"]), **{name: settings[name] for name in names})

    @classmethod
    def why_unreadable(cls, settings: Mapping[str, Any]) -> str | None:
        """Nothing that it says can be of a later version."""
        return None

    def settings(self) -> dict[str, Any]:
        """Returns the settings that the manifest keeps."""
        names = (*SHARED, "step", "calibration_positions")
        return {"kind": self.kind, "layers": list(self.layers), **{name: getattr(self, name) for name in names}}

    def describe(self) -> str:
        """One line for people."""
        kept = "queries, keys and values" if self.values else "queries and keys"
        blocks = ", ".join(map(str, self.layers))
        return f"attention of blocks {blocks} ({self.heads} heads, {kept}, step {self.step:g})"

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Blocks whose attention is recorded."""
        return self.layers

    @property
    def columns(self) -> tuple[Column, ...]:
        """A column for each part of each layer."""
        return tuple(
            Column(
                f"{part}_{layer}",
                "<i4",
                (self.part_width(part),),
                PCO,
                groups=(self.part_width(part),),
                of="token",
            )
            for layer in self.layers
            for part in self.parts
        )

    @property
    def token_bytes(self) -> float:
        """Entropy of normal channels in such steps."""
        channels = len(self.layers) * sum(self.part_width(part) for part in self.parts)
        return channels * max(1.0, float(np.log2(4.13 / self.step))) / 8

    def arrays(self) -> dict[str, tuple[int | None, ...]]:
        """Spread of each channel."""
        return {
            f"attention.{layer}.{part}_spread": (self.part_width(part),) for layer in self.layers for part in self.parts
        }

    def with_layers(self, layers: LayerFile) -> QueriesKeys:
        """The kind, ready to capture and to read; raises `ValueError` for arrays that are missing or of other sizes."""
        layers.check(self.arrays())
        for layer in self.layers:
            name = f"attention.{layer}.sinks"
            layers.check({name: (self.heads,)} if name in layers.arrays else {})
        for name in self.arrays():
            if not float(layers.arrays[name].min()) > 0:
                raise ValueError(f"{name} holds what is no spread")
        return replace(self, layer_file=layers, shapes=self.shapes_of(layers), copies={})

    def capture(self, torch: ModuleType, row: RowActivations) -> dict[str, Array]:
        """Codes of one row, [S, H·E] or [S, K·E] each. Raises `ValueError` for what is no number."""
        captured = {}
        for layer in self.layers:
            for part, heads in zip(PARTS, (row.queries, row.keys, row.values), strict=True):
                if part in self.parts:
                    flat_SX = heads[layer].transpose(0, 1).flatten(1).float()
                    captured[f"{part}_{layer}"] = self._coded(torch, layer, part, flat_SX)
        return captured

    def _coded(self, torch: ModuleType, layer: int, part: str, flat_SX: Tensor) -> Array:
        spread_X = self.arrays_of(layer, flat_SX)[f"{part}_spread"]
        codes_SX = (flat_SX / (self.step * spread_X)).round()
        if not float(codes_SX.abs().max()) < 2**31 - 128:  # float32 next to 2³¹; NaN is not below it either
            raise ValueError(
                f"the teacher's attention of block {layer} is not finite, or too large for codes of 32 bits"
            )
        return codes_SX.to(torch.int32).cpu().numpy()

    def decoded(self, stored: Mapping[str, Array]) -> dict[str, Array]:
        """Queries, keys and values of columns that are there, float32 [S, H·E] or [S, K·E]."""
        if self.layer_file is None:
            raise CacheError("attention is read with the layer file in the cache's teacher/ folder")
        decoded = {}
        for layer in self.layers:
            for part in self.parts:
                if f"{part}_{layer}" in stored:
                    spread_X = self.layer_file.arrays[f"attention.{layer}.{part}_spread"]
                    values_SX = stored[f"{part}_{layer}"].astype(np.float32)
                    decoded[f"{part}_{layer}"] = values_SX * (np.float32(self.step) * spread_X)
        return decoded

    def columns_of(self, layer: int) -> tuple[str, ...]:
        """Columns that a block's attention is read from."""
        return tuple(f"{part}_{layer}" for part in self.parts)

    def stored_heads(
        self, torch: ModuleType, layer: int, arrays: Mapping[str, Tensor], position_BS: Tensor
    ) -> StoredHeads:
        """Queries and keys of a block, from `arrays`: what is decoded of `columns_of`, as [B, S, …]."""
        heads = {
            part: arrays[f"{part}_{layer}"].unflatten(-1, (-1, self.head_width)).transpose(1, 2) for part in self.parts
        }
        sinks_H = self.arrays_of(layer, arrays[f"query_{layer}"]).get("sinks")
        return StoredHeads(heads["query"], heads["key"], heads.get("value"), self.shapes[layer], sinks_H)
