"""Micro-batch of a loss across tokenizers: chunks of tokens that stand for the same bytes on both sides.

Shapes: N positions of the student (tokens whose next token it learns), M chunks whose tokens both sides predict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

PREFIX = "chunk_"  # of these arrays among the tensors of a batch


@dataclass(frozen=True, eq=False)
class Chunks:
    """The chunks of a micro-batch, in the order of their positions.

    Before a chunk both models have read the same bytes: there, at `first_M`, their next tokens can be compared.
    """

    first_M: Tensor  # the student's position that predicts the chunk's first token, an index into N
    last_M: Tensor  # the one that comes after its last token; N where that is no position, or none of the teacher's
    of_N: Tensor  # which chunk each position predicts a token of; M where none
    log_prob_M: Tensor  # of the chunk under the teacher, nats
    boundary_M: Tensor  # the teacher's log-mass on tokens that begin a new pre-token there; 0 where there is no `last`

    @classmethod
    def of(cls, arrays: Mapping[str, Tensor], like: Tensor) -> Chunks:
        """From the tensors of a batch, on the device of `like`."""
        columns = {
            name.removeprefix(PREFIX): values.to(like.device)
            for name, values in arrays.items()
            if name.startswith(PREFIX)
        }
        return cls(columns["first"], columns["last"], columns["of"], columns["log_prob"], columns["boundary"])

    def __len__(self) -> int:
        return len(self.first_M)
