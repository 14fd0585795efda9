"""Tail policy `sketch`: a low-rank sketch of the logits outside the head gives every token its own share."""

from __future__ import annotations

from dataclasses import dataclass

from teachercache.targets.logits.softened import Softened
from teachercache.targets.logits.tails.policy import SKETCH, TailContext


@dataclass(frozen=True)
class Sketch:
    """Takes the shape that the cache stores."""

    name = "sketch"
    needs = frozenset((SKETCH,))
    tells_tokens_apart = True
    keeps_mass = True

    def apply(self, softened: Softened, context: TailContext) -> Softened:
        """See `TailPolicy`; the kind must give a sketch."""
        assert context.sketch is not None
        return softened.with_tail(context.sketch())
