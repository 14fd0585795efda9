"""The contract of a layer kind: what every kind of target in this package provides that is stored of a teacher's layers.

A kind stores arrays by *token* (hidden states, queries, keys) or by *pair* of tokens (maps), of all tokens of a row: a map
needs the keys of prompts, too. What its numbers are read by (means, steps, weights) is in one file of the cache, the *layer
file* of its section, written once by the teacher before anything is captured.

Shapes: S tokens of a row, P pairs of a token and one of its segment that is not after it, D width of the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from teachercache.targets.coding.columns import Column
from teachercache.targets.layers.attention import HeadShape

Arrays = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class RowActivations:
    """Activations of the teacher's layers at the tokens of one row; torch's tensors."""

    hidden: Mapping[int, Any]  # [S, D]
    queries: Mapping[int, Any]  # [H, S, E]
    keys: Mapping[int, Any]  # [K, S, E]
    values: Mapping[int, Any]  # [K, S, E]
    shapes: Mapping[int, HeadShape]
    sinks: Mapping[int, Any]  # [H], of attention that has them
    segment_S: NDArray[Any]  # number of each token's segment


class LayerKind(Protocol):
    """Settings of a kind and what follows from them; immutable."""

    @property
    def section(self) -> str:
        """Its key in `targets`, in recipes and manifests: `hidden` or `attention`."""

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

    def settings(self) -> dict[str, Any]:
        """Returns the settings that the manifest keeps."""

    def describe(self) -> str:
        """One line for people."""

    def arrays(self) -> dict[str, tuple[int | None, ...]]:
        """Arrays of the layer file that it is read by, with their shapes; None is any size."""

    def with_layers(self, layers: Any) -> LayerKind:
        """The kind with the cache's layer file (`LayerFile`), ready to capture and to read; raises `ValueError` where arrays
        are missing or of other sizes."""

    def capture(self, torch: Any, row: RowActivations) -> dict[str, NDArray[Any]]:
        """One row's columns. Raises `ValueError` for numbers that cannot be stored."""

    def check_stored(self, stored: Arrays) -> None:
        """Raise `CacheDamaged` where a row's columns, those that are there, cannot be."""

    def decoded(self, stored: Arrays) -> dict[str, NDArray[Any]]:
        """One row's columns, those that are there, as arrays ready for a batch: [S, …], of columns by pair [P, …]."""
