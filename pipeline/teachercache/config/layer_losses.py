"""`LAYER_LOSSES`: the losses between layers that a recipe may ask for.

Another loss is a module in `objective/layers/` and a line here; from outside the package,
`LAYER_LOSSES.register(LayerLoss(…))`. A line names the class and does not import it: recipes are read without torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from teachercache.registry import Registry

SHARED = ("heads", "first_key", "relation_heads", "centred", "adapter")  # keys that mean nothing to some of the losses
_FOLDER = "teachercache.objective.layers"


@dataclass(frozen=True)
class LayerLoss:
    """One loss. `term` is the class that computes it (`LayerTerm` in objective/layers/term.py), or where that is,
    `MODULE:CLASS`. `takes` are those of the `SHARED` keys that mean something to it; `config` is a subclass of
    `LayerTermConfig` with keys of its own, which a loss from outside needs."""

    name: str
    term: str | type[Any]
    takes: tuple[str, ...] = ()
    config: type[Any] | None = None

    def term_class(self) -> type[Any]:
        """The class, imported now where a name stands for it."""
        if not isinstance(self.term, str):
            return self.term
        module, _, name = self.term.partition(":")
        loaded: type[Any] = getattr(import_module(module), name)
        return loaded


def _of(term: str, *names: str, takes: tuple[str, ...]) -> Iterator[LayerLoss]:
    """The losses that one class of `objective/layers/` computes."""
    return (LayerLoss(name, f"{_FOLDER}.{term}", takes) for name in names)


LAYER_LOSSES: Registry[LayerLoss] = Registry(
    "layer loss",
    (
        *_of("hidden:HiddenTerm", "hidden-cosine", "hidden-mse", takes=("centred", "adapter")),
        *_of("attention:AttentionTerm", "attention-kl", "attention-mse", takes=("heads", "first_key")),
        *_of(
            "relations:RelationTerm", "query-relations", "key-relations", "value-relations", takes=("relation_heads",)
        ),
        *_of(
            "structure:StructureTerm",
            "distances",
            "angles",
            "sample-distances",
            "channel-correlation",
            takes=("centred",),
        ),
    ),
    name_of=lambda loss: loss.name,
)
