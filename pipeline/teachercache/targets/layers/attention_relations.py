"""Attention as relations, linear in the length of a row: what any head's map is rebuilt from when a student is trained.

    relations       nothing but the hidden state that enters the block, which is stored anyway or for this; the layer file
                    holds the block's norm, its query and key matrices, and the rotary table
    queries-keys    queries and keys themselves, after rotation, in steps of each channel's own spread; for architectures
                    whose queries and keys are made in another way

Either can keep values too, for relations among values (Wang et al., "MiniLMv2", 2021). Codes are entropy-coded and never
clipped, as in hidden_states.py: attention sinks make keys of first tokens that are far outside, and clipping them moves the
mass of whole rows.

Shapes: B rows, S tokens, D width, H heads of queries, K of keys and values, E a head's width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teachercache.errors import CacheError
from teachercache.targets.coding.columns import Column
from teachercache.targets.coding.pco import NAME as PCO
from teachercache.targets.layers.attention import BlockEntry, HeadShape, log_attention
from teachercache.targets.layers.hidden_states import column_of as hidden_column
from teachercache.targets.layers.kind import RowActivations
from teachercache.targets.layers.layer_file import LayerFile

Array = NDArray[Any]
PARTS = ("query", "key", "value")
OPTIONAL = ("norm", "norm_bias", "query_bias", "key_bias", "value_bias", "query_norm", "key_norm", "cos", "sin")


@dataclass(frozen=True, eq=False)
class StoredHeads:
    """Queries and keys of a batch [B, H or K, S, E], values where they are kept, and how scores are formed."""

    queries_BHSE: Any
    keys_BKSE: Any
    values_BKSE: Any
    shape: HeadShape
    sinks_H: Any

    @property
    def heads(self) -> int:
        """Number of heads of queries."""
        return self.shape.heads

    @property
    def window(self) -> int | None:
        """Keys that a query sees, itself included."""
        return self.shape.window

    def probabilities(self, part: slice, sees_BCT: Any, *, first: int = 0, sinks: bool = False) -> Any:
        """Returns the attention of some queries, float32 [B, H, C, T], over the keys that `sees_BCT` lets them see;
        with `sinks` these have the rest."""
        log_BHCT = log_attention(
            self.queries_BHSE[:, :, part],
            self.keys_BKSE[:, :, first : first + sees_BCT.shape[-1]],
            sees_BCT,
            scaling=self.shape.scaling,
            softcap=self.shape.softcap,
            sinks_H=self.sinks_H if sinks else None,
        )
        return log_BHCT.exp().masked_fill(~sees_BCT[:, None], 0.0)


@dataclass(frozen=True, eq=False)
class _Factors:
    """Common part of both kinds: settings, and the layer file once there is one."""

    kind = ""
    keeps_vectors = True  # of queries and keys
    section = "attention"

    layers: tuple[int, ...] = ()
    heads: int = 0
    key_heads: int = 0
    head_width: int = 0
    width: int = 0
    blocks: int = 0  # of the teacher
    values: bool = False
    layer_file: LayerFile | None = None
    shapes: Mapping[int, HeadShape] = field(default_factory=dict)
    copies: dict[Any, Any] = field(default_factory=dict, repr=False)  # of arrays, by layer and device

    @property
    def teacher_heads(self) -> int:
        """All of them are stored."""
        return self.heads

    @property
    def parts(self) -> tuple[str, ...]:
        """`query`, `key`, and `value` where values are kept."""
        return PARTS if self.values else PARTS[:2]

    def part_width(self, part: str) -> int:
        """Channels of a part over all of its heads."""
        return (self.heads if part == "query" else self.key_heads) * self.head_width

    def _shapes_of(self, layers: LayerFile) -> dict[int, HeadShape]:
        return layers.head_shapes(self.layers, (self.heads, self.key_heads, self.head_width))

    def _arrays_of(self, layer: int, like: Any) -> dict[str, Any]:
        """Arrays of a layer with the device of a tensor; made once for each."""
        if self.layer_file is None:
            raise CacheError("attention is read with the layer file in the cache's teacher/ folder")
        key = (layer, str(like.device))
        if key not in self.copies:
            prefix = f"attention.{layer}."
            block_arrays = {name: values for name, values in self.layer_file.arrays.items() if name.startswith(prefix)}
            self.copies[key] = {
                name.removeprefix(prefix): like.new_tensor(values) for name, values in block_arrays.items()
            }
        return self.copies[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "copies": {}}

    def check_stored(self, stored: Mapping[str, Array]) -> None:
        """Codes can be any."""


@dataclass(frozen=True, eq=False)
class Relations(_Factors):
    """Attention rebuilt from the hidden state that enters its block."""

    kind = "relations"
    attention_layers: tuple[int, ...] = ()
    columns: tuple[Column, ...] = ()
    token_bytes: float = 0.0

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Relations:
        """Rebuild from a manifest's settings."""
        return cls(layers=tuple(settings["layers"]), **{name: settings[name] for name in _SHARED})

    def settings(self) -> dict[str, Any]:
        """Returns the settings that the manifest keeps."""
        return {"kind": self.kind, "layers": list(self.layers), **{name: getattr(self, name) for name in _SHARED}}

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
        shapes = self._shapes_of(layers)
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

    def capture(self, torch: Any, row: RowActivations) -> dict[str, Array]:
        """Nothing but hidden states, which are a kind of their own."""
        return {}

    def decoded(self, stored: Mapping[str, Array]) -> dict[str, Array]:
        """Nothing but hidden states, which are a kind of their own."""
        return {}

    def columns_of(self, layer: int) -> tuple[str, ...]:
        """Columns that a block's attention is read from."""
        return (hidden_column(layer - 1),)

    def stored_heads(self, torch: Any, layer: int, arrays: Mapping[str, Any], position_BS: Any) -> StoredHeads:
        """Queries and keys of a block, from `arrays`: what is decoded of `columns_of`, as [B, S, …]."""
        hidden_BSD = arrays[hidden_column(layer - 1)]
        read_by = self._arrays_of(layer, hidden_BSD)
        assert self.layer_file is not None
        shape = self.shapes[layer]
        entry = _entry_of(self.layer_file, layer)
        queries, keys, values = entry.apply(torch, read_by, hidden_BSD, position_BS, shape)
        return StoredHeads(queries, keys, values, shape, read_by.get("sinks"))


@dataclass(frozen=True, eq=False)
class QueriesKeys(_Factors):
    """Queries and keys as they enter the scores. `step` is in units of a channel's spread."""

    kind = "queries-keys"
    hidden_layers: tuple[int, ...] = ()
    step: float = 0.0
    calibration_positions: int = 0

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> QueriesKeys:
        """Rebuild from a manifest's settings."""
        names = (*_SHARED, "step", "calibration_positions")
        return cls(layers=tuple(settings["layers"]), **{name: settings[name] for name in names})

    def settings(self) -> dict[str, Any]:
        """Returns the settings that the manifest keeps."""
        names = (*_SHARED, "step", "calibration_positions")
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
        return replace(self, layer_file=layers, shapes=self._shapes_of(layers), copies={})

    def capture(self, torch: Any, row: RowActivations) -> dict[str, Array]:
        """Codes of one row, [S, H·E] or [S, K·E] each. Raises `ValueError` for what is no number."""
        captured = {}
        for layer in self.layers:
            for part, heads in zip(PARTS, (row.queries, row.keys, row.values), strict=True):
                if part in self.parts:
                    flat_SX = heads[layer].transpose(0, 1).flatten(1).float()
                    captured[f"{part}_{layer}"] = self._coded(torch, layer, part, flat_SX)
        return captured

    def _coded(self, torch: Any, layer: int, part: str, flat_SX: Any) -> Array:
        spread_X = self._arrays_of(layer, flat_SX)[f"{part}_spread"]
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

    def stored_heads(self, torch: Any, layer: int, arrays: Mapping[str, Any], position_BS: Any) -> StoredHeads:
        """Queries and keys of a block, from `arrays`: what is decoded of `columns_of`, as [B, S, …]."""
        queries, keys, values = (
            arrays[f"{part}_{layer}"].unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            if part in self.parts
            else None
            for part in PARTS
        )
        sinks_H = self._arrays_of(layer, arrays[f"query_{layer}"]).get("sinks")
        return StoredHeads(queries, keys, values, self.shapes[layer], sinks_H)


_SHARED = ("heads", "key_heads", "head_width", "width", "blocks", "values")


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
