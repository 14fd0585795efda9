"""Tail policy `ghost`: the tail is one outcome, whose mass a student is asked for, not its shape."""

from __future__ import annotations

from dataclasses import dataclass

from teachercache.targets.logits.softened import Softened
from teachercache.targets.logits.tails.policy import HEAD, MASS, TailContext


@dataclass(frozen=True)
class Ghost:
    """Leaves the distribution as it is."""

    name = "ghost"
    needs = frozenset((HEAD, MASS))
    tells_tokens_apart = False
    keeps_mass = True

    def apply(self, softened: Softened, context: TailContext) -> Softened:
        """See `TailPolicy`."""
        return softened
