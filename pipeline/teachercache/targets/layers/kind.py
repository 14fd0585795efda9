"""The contract of a layer kind: what every kind of target in this package provides that is stored of a teacher's layers.

A kind stores arrays by *token* (hidden states, queries, keys) or by *pair* of tokens (maps), of all tokens of a row: a map
needs the keys of prompts, too. What its numbers are read by (means, steps, weights) is in one file of the cache, the *layer
file* of its section, written once by the teacher before anything is captured.

Shapes: S tokens of a row, P pairs of a token and one of its segment that is not after it, D width of the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from numpy.typing import NDArray

from teachercache.targets.coding.columns import Column
from teachercache.targets.layers.attention import HeadShape, TaughtAttention
from teachercache.targets.layers.claims import LayerClaim
from teachercache.targets.layers.layer_file import LayerFile
from teachercache.targets.layers.settings import LayerSettings

if TYPE_CHECKING:
    from torch import Tensor

Arrays = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class RowActivations:
    """Activations of the teacher's layers at the tokens of one row; torch's tensors."""

    hidden: Mapping[int, Tensor]  # [S, D]
    queries: Mapping[int, Tensor]  # [H, S, E]
    keys: Mapping[int, Tensor]  # [K, S, E]
    values: Mapping[int, Tensor]  # [K, S, E]
    shapes: Mapping[int, HeadShape]
    sinks: Mapping[int, Tensor]  # [H], of attention that has them
    segment_S: NDArray[Any]  # number of each token's segment


class LayerKind(Protocol):
    """Settings of a kind and what follows from them; immutable, picklable."""

    kind: ClassVar[str]  # its name in recipes and manifests
    section: ClassVar[str]  # its key in `targets`, in recipes and manifests: `hidden` or `attention`
    config: ClassVar[type[LayerSettings]]  # its settings in a recipe
    claim: ClassVar[type[LayerClaim]]  # its settings in a manifest, which are checked when a cache is opened

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers that are stored, rising; of attention those of blocks."""

    @property
    def width(self) -> int:
        """Channels of the teacher's hidden states."""

    @property
    def blocks(self) -> int:
        """Blocks of the teacher."""

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """Hidden states that must be recorded for it."""

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Attention that must be recorded for it."""

    @property
    def columns(self) -> tuple[Column, ...]:
        """Payload columns, in the order in which shards store them."""

    @property
    def token_bytes(self) -> float:
        """About what a token takes on disk; decides how many rows share a shard."""

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> LayerKind:
        """Rebuild from a manifest's settings, or from those of a recipe for a teacher (`LayerSettings.for_teacher`)."""

    @classmethod
    def why_unreadable(cls, settings: Mapping[str, Any]) -> str | None:
        """Returns what of a manifest's settings is of a later version, in a line; None where there is nothing."""

    def settings(self) -> dict[str, Any]:
        """Returns the settings that the manifest keeps."""

    def describe(self) -> str:
        """One line for people."""

    def arrays(self) -> dict[str, tuple[int | None, ...]]:
        """Arrays of the layer file that it is read by, with their shapes; None is any size."""

    def with_layers(self, layers: LayerFile) -> LayerKind:
        """The kind with the cache's layer file (`LayerFile`), ready to capture and to read; raises `ValueError` where arrays
        are missing or of other sizes."""

    def capture(self, torch: ModuleType, row: RowActivations) -> dict[str, NDArray[Any]]:
        """One row's columns. Raises `ValueError` for numbers that cannot be stored."""

    def check_stored(self, stored: Arrays) -> None:
        """Raise `CacheDamaged` where a row's columns, those that are there, cannot be."""

    def decoded(self, stored: Arrays) -> dict[str, NDArray[Any]]:
        """One row's columns, those that are there, as arrays ready for a batch: [S, …], of columns by pair [P, …]."""


class HiddenKind(LayerKind, Protocol):
    """A kind of hidden states. `decoded` gives `hidden_LAYER`, float32 [S, D]. The layer file has each layer's `mean` and
    `spread`, whatever the kind asks for, and its `rotation` where `arrays` names one."""

    @property
    def layer_file(self) -> LayerFile | None:
        """The layer file, once there is one."""


class AttentionKind(LayerKind, Protocol):
    """A kind of attention. The layer file describes the shape of each block's heads; it has what `arrays` names:
    `query_spread`, `key_spread` and `value_spread` of each channel, and with `from_hidden` the arrays by which blocks make
    their queries."""

    keeps_vectors: ClassVar[bool]  # queries and keys, and not maps alone
    holds_sinks: ClassVar[bool]  # logits that belong to no key are in it
    from_hidden: ClassVar[bool]  # it is rebuilt from stored hidden states: those of `hidden_layers`

    @property
    def values(self) -> bool:
        """Tells whether values are kept, beside queries and keys."""

    @property
    def heads(self) -> int:
        """Heads that are stored."""

    @property
    def teacher_heads(self) -> int:
        """Heads of the teacher."""

    @property
    def key_heads(self) -> int:
        """Heads of keys of the teacher."""

    @property
    def head_width(self) -> int:
        """Channels of a head."""

    def columns_of(self, layer: int) -> tuple[str, ...]:
        """Columns that a block's attention is read from."""

    def stored_heads(
        self, torch: ModuleType, layer: int, arrays: Mapping[str, Tensor], position_BS: Tensor
    ) -> TaughtAttention:
        """One block's attention of a batch, from `arrays`: what is decoded of `columns_of`, as [B, S, …], of columns by pair
        [B, S, S, …]. `position_BS` counts from each segment's first token."""
