"""Parts that attention is rebuilt from: queries, keys and values of a batch, and what the kinds share that give them.

Codes of vectors are entropy-coded and never clipped, as in hidden_states.py: attention sinks make keys of first tokens that
are far outside, and clipping them moves the mass of whole rows.

Shapes: B rows, S tokens, D width, H heads of queries, K of keys and values, E a head's width, C queries, T keys of a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from numpy.typing import NDArray

from teachercache.errors import CacheError
from teachercache.targets.layers.attention import HeadShape, log_attention
from teachercache.targets.layers.claims import AttentionClaim
from teachercache.targets.layers.layer_file import LayerFile

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[Any]
PARTS = ("query", "key", "value")
SHARED = ("heads", "key_heads", "head_width", "width", "blocks", "values")  # settings of both kinds


class FactorsClaim(AttentionClaim):
    """Settings of both kinds in a manifest."""

    values: bool


@dataclass(frozen=True, eq=False)
class StoredHeads:
    """Queries and keys of a batch [B, H or K, S, E], values where they are kept, and how scores are formed."""

    queries_BHSE: Tensor
    keys_BKSE: Tensor
    values_BKSE: Tensor | None
    shape: HeadShape
    sinks_H: Tensor | None

    @property
    def heads(self) -> int:
        """Number of heads of queries."""
        return self.shape.heads

    @property
    def window(self) -> int | None:
        """Keys that a query sees, itself included."""
        return self.shape.window

    def probabilities(self, part: slice, sees_BCT: Tensor, *, first: int = 0, sinks: bool = False) -> Tensor:
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
class AttentionFactors:
    """Common part of both kinds: settings, and the layer file once there is one."""

    section: ClassVar[str] = "attention"
    keeps_vectors: ClassVar[bool] = True
    holds_sinks: ClassVar[bool] = True

    layers: tuple[int, ...] = ()
    heads: int = 0
    key_heads: int = 0
    head_width: int = 0
    width: int = 0
    blocks: int = 0  # of the teacher
    values: bool = False
    layer_file: LayerFile | None = None
    shapes: Mapping[int, HeadShape] = field(default_factory=dict)
    copies: dict[tuple[int, str], dict[str, Tensor]] = field(
        default_factory=dict, repr=False
    )  # of arrays, by layer and device

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

    def shapes_of(self, layers: LayerFile) -> dict[int, HeadShape]:
        """Returns the shapes of the blocks' heads. Raises `ValueError` for heads that are not those of the settings."""
        return layers.head_shapes(self.layers, (self.heads, self.key_heads, self.head_width))

    def arrays_of(self, layer: int, like: Tensor) -> dict[str, Tensor]:
        """Returns the arrays of a layer, on the device of a tensor; made once for each."""
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
