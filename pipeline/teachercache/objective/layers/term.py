"""The contract of a layer-wise term, and what a term sees of a micro-batch.

Shapes: B rows, S tokens, N positions, D width, H heads, E a head's width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from teachercache.config import LayerTermConfig
from teachercache.targets import StoredTargets
from teachercache.targets.layers.attention import TaughtAttention

if TYPE_CHECKING:
    from teachercache.models.activations import Heads


@dataclass(frozen=True, eq=False)
class LayerBatch:
    """One micro-batch. The adaptive mask is the same for all terms: positions, that is, tokens whose next token is a target.
    Padding, prompts and last tokens of segments are none; a query sees keys of its own segment alone."""

    mask_BS: Tensor  # bool: positions
    segment_BS: Tensor  # of each token in its row, -1 for padding
    first_BS: Tensor  # bool: first tokens of segments
    hidden: Mapping[int, Tensor]  # of the student, [B, S, Ds]
    attention: Mapping[int, Heads]  # of the student
    teacher_hidden: Mapping[int, Tensor]  # [B, S, Dt], float32, less the corpus mean where a term asks for that
    teacher_attention: Mapping[int, TaughtAttention]  # `StoredHeads` where the cache keeps vectors
    similarity: dict[int, Tensor] = field(
        default_factory=dict
    )  # sums of cosines, by the student's layer; terms add them


@dataclass(frozen=True)
class StudentShape:
    """Sizes of a student that decide its adapters."""

    blocks: int
    width: int
    heads: int
    key_heads: int
    head_width: int


def hidden_arrays(targets: StoredTargets, layer: int) -> dict[str, Any]:
    """Mean and spread of a layer's channels over the corpus."""
    assert targets.hidden is not None and targets.hidden.layer_file is not None
    arrays = targets.hidden.layer_file.arrays
    return {name: arrays[f"hidden.{layer}.{name}"] for name in ("mean", "spread")}


class LayerTerm(Protocol):
    """A loss between layers of the student and stored ones; a `torch.nn.Module` for the adapters in it, which alone are called
    as modules are: ZeRO 3 looks for weights, and for tensors, in what goes into those and comes out."""

    pairs: tuple[tuple[int, int], ...]  # (student's layer, teacher's layer)
    of: str  # hidden or attention: what of the layers it compares
    measures_similarity: bool  # whether it adds to `LayerBatch.similarity`

    @property
    def least_segments(self) -> int:
        """Segments that a micro-batch must have for the loss to say anything."""

    @classmethod
    def fitted(
        cls,
        config: LayerTermConfig,
        pairs: tuple[tuple[int, int], ...],
        *,
        targets: StoredTargets,
        student: StudentShape,
    ) -> LayerTerm:
        """The term that a recipe describes, for these pairs of layers, of a cache that stores `targets`. Raises `CacheError`
        where cache and student do not fit it."""

    def loss(self, batch: LayerBatch) -> Tensor:
        """The sum over the positions of the batch, the mean over pairs; a scalar, float32, on the student's graph."""

    def zero_contribution(self, like: Tensor) -> Tensor:
        """Zero, a scalar on the device of `like`, by the same modules in the same order as `loss` calls, each as often: a
        process whose micro-batch is of another cache must take part when ZeRO 3 gathers weights and gradients are reduced."""
