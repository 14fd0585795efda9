"""The contract of a loss across tokenizers. One is a file here; `terms_of` in __init__.py dispatches them.

Shapes: P chunks of a block, M of a micro-batch, V tokens of the student's vocabulary.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from teachercache.objective.cross_tokenizer.batch import Chunks
from teachercache.targets.logits.softened import Softened


class PairTerm(Protocol):
    """Compares next-token distributions where a chunk begins."""

    @property
    def name(self) -> str:
        """In logs."""

    @property
    def weight(self) -> float:
        """Beside other terms."""

    @property
    def temperature(self) -> float:
        """At which the teacher's distribution is asked for."""

    @property
    def measured(self) -> tuple[str, ...]:
        """Further figures that logs get."""

    def values(self, logits_PV: Tensor, teacher: Softened) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each chunk, [P], on the graph of the student's float32 logits; and what is measured, detached, [P]."""


class ChunkTerm(Protocol):
    """Compares the likelihoods of whole chunks."""

    @property
    def name(self) -> str:
        """In logs."""

    @property
    def weight(self) -> float:
        """Beside other terms."""

    @property
    def boundaries(self) -> bool:
        """Tells whether it needs the mass on tokens that begin a new pre-token after a chunk."""

    def values(self, log_prob_M: Tensor, boundary_M: Tensor | None, chunks: Chunks) -> Tensor:
        """The loss of each chunk, [M], from the student's log-likelihood of it and its log-mass on boundaries after it (0 where
        the chunk has no `last`)."""
