"""Terms between layers in training: adapters as a part of the student, and what its layers hold while it runs.

The adapters are a submodule of the student, `distillation`, so that ZeRO shards them with it, optimizers and checkpoints
have them, and they run inside the student's forward pass. `without_adapters` is what an export does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teachercache.activations import ADAPTERS, Activations, check_attention, recorded
from teachercache.config import ObjectiveConfig
from teachercache.errors import ModelError
from teachercache.objective.layers import LayerLoss, LayerObjective, StudentShape
from teachercache.shards import Cache


def layer_objectives(
    model: Any, config: ObjectiveConfig, caches: Sequence[Cache], *, seed: int
) -> Sequence[LayerObjective]:
    """One for each cache, which are now a part of the model; none without terms between layers. `seed` decides what adapters
    begin with.

    Raises `CacheError` where layers, heads or widths of cache and student do not fit, `ModelError` for a student whose layers
    cannot be recorded.
    """
    if not config.layers:
        return ()
    shape = student_shape(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = [LayerObjective(config.layers, cache.targets, shape) for cache in caches]
    _try(model, made)
    model.add_module(ADAPTERS, torch.nn.ModuleList(made))
    return made


def student_shape(model: Any) -> StudentShape:
    """From its config. Raises `ModelError` where that does not say."""
    text = model.config.get_text_config()
    try:
        heads, width = text.num_attention_heads, text.hidden_size
        key_heads = getattr(text, "num_key_value_heads", None) or heads
        head_width = getattr(text, "head_dim", None) or width // heads
        return StudentShape(text.num_hidden_layers, width, heads, key_heads, head_width)
    except AttributeError as error:
        raise ModelError(
            f"the student's config.json does not describe its layers ({error}); leave objective.layers out"
        ) from None


def _try(model: Any, objectives: Sequence[LayerObjective]) -> None:
    """Whether its layers can be recorded, on two tokens, before anything is trained."""
    layers = {
        what: sorted({layer for each in objectives for layer in getattr(each, f"{what}_layers")})
        for what in ("hidden", "attention")
    }
    was_training = model.training
    model.eval()
    with torch.no_grad(), recorded(model, **layers) as activations:
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=False)
    model.train(was_training)
    check_attention(activations, layers["attention"], model)


@contextmanager
def watched(model: Any, objective: LayerObjective | None) -> Iterator[Activations | None]:
    """While it is open, what the objective compares of the student is recorded; None where there is no objective."""
    if objective is None:
        yield None
        return
    with recorded(model, hidden=objective.hidden_layers, attention=objective.attention_layers) as activations:
        yield activations


def logged(loss: LayerLoss) -> dict[str, Tensor]:
    """Its sums by the names that logs give them."""
    return {**loss.terms, **{f"similarity_{layer}": sums for layer, sums in loss.similarity.items()}}


def names_logged(objectives: Sequence[LayerObjective]) -> tuple[str, ...]:
    """All names that `logged` can give, the same in every process."""
    names = [name for each in objectives for name in (*each.names, *(f"similarity_{i}" for i in each.similarities))]
    return tuple(dict.fromkeys(names))


def without_adapters(folder: Path) -> None:
    """Take the adapters' weights out of a saved model, in place; nothing is written where there are none."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    prefix = f"{ADAPTERS}."
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names, metadata = list(file.keys()), file.metadata()
            if not any(name.startswith(prefix) for name in names):
                continue
            kept = {name: file.get_tensor(name) for name in names if not name.startswith(prefix)}
        save_file(kept, path, metadata=metadata)
    _unlist(folder, prefix)


def _unlist(folder: Path, prefix: str) -> None:
    import json

    for path in folder.glob("*.safetensors.index.json"):
        index = json.loads(path.read_text(encoding="utf-8"))
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if not name.startswith(prefix)}
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
