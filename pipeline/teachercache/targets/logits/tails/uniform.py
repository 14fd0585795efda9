"""Tail policy `uniform`: every token outside the head gets the same share of the tail's mass."""

from __future__ import annotations

from dataclasses import dataclass

from teachercache.targets.logits.softened import Softened, UniformTail
from teachercache.targets.logits.tails.policy import HEAD, MASS, TailContext


@dataclass(frozen=True)
class Uniform:
    """Spreads the mass evenly."""

    name = "uniform"
    needs = frozenset((HEAD, MASS))
    tells_tokens_apart = True
    keeps_mass = True

    def apply(self, softened: Softened, context: TailContext) -> Softened:
        """See `TailPolicy`."""
        return softened.with_tail(UniformTail(context.vocabulary_size, softened.head_log_prob_Nk))
