"""Tail policy `renormalise`: the tail is dropped and the head scaled to mass one (the field's usual top-k loss)."""

from __future__ import annotations

from dataclasses import dataclass

from teachercache.targets.logits.softened import Softened
from teachercache.targets.logits.tails.policy import HEAD, TailContext


@dataclass(frozen=True)
class Renormalise:
    """Gives tokens outside the head no mass: a divergence that asks a student's mass there for a reason is infinite."""

    name = "renormalise"
    needs = frozenset((HEAD,))
    tells_tokens_apart = True
    keeps_mass = False

    def apply(self, softened: Softened, context: TailContext) -> Softened:
        """See `TailPolicy`."""
        return softened.renormalised()
