"""The losses between layers that a recipe may ask for: their names, and which of the shared keys mean something to each.

Another loss is a module in `objective/layers/` with a line in its `TERMS`, and a line here; from outside the package,
`teachercache.objective.layers.terms.register_layer_loss`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from teachercache.registry import Registry

SHARED = ("heads", "first_key", "relation_heads", "centred", "adapter")  # keys that mean nothing to some of the losses


@dataclass(frozen=True)
class LayerLoss:
    """One loss. `takes` are those of the `SHARED` keys that mean something to it; `config` is a subclass of `LayerTermConfig`
    with keys of its own, for a loss from outside."""

    name: str
    takes: tuple[str, ...] = ()
    config: type[Any] | None = None


LAYER_LOSSES: Registry[LayerLoss] = Registry(
    "layer loss",
    (
        LayerLoss("hidden-cosine", ("centred", "adapter")),
        LayerLoss("hidden-mse", ("centred", "adapter")),
        LayerLoss("attention-kl", ("heads", "first_key")),
        LayerLoss("attention-mse", ("heads", "first_key")),
        LayerLoss("query-relations", ("relation_heads",)),
        LayerLoss("key-relations", ("relation_heads",)),
        LayerLoss("value-relations", ("relation_heads",)),
        LayerLoss("distances", ("centred",)),
        LayerLoss("angles", ("centred",)),
        LayerLoss("sample-distances", ("centred",)),
        LayerLoss("channel-correlation", ("centred",)),
    ),
    name_of=lambda loss: loss.name,
)
