"""Terms between layers in training: adapters as a part of the student, and what its layers hold while it runs.

The adapters are a submodule of the student, `distillation`, so that ZeRO shards them with it, optimizers and checkpoints
have them, and they run inside the student's forward pass. `without_adapters` is what an export does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from teachercache.cache import Cache
from teachercache.config import ObjectiveConfig
from teachercache.errors import ModelError, RecipeError
from teachercache.models.activations import ADAPTERS, Activations, check_attention, recorded
from teachercache.models.loading import runnable_here
from teachercache.objective.layers.objective import LayerLossSums, LayerObjective, StudentShape
from teachercache.training.initialise.partitioned import rows_of, runnable

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def layer_objectives(
    model: PreTrainedModel, config: ObjectiveConfig, caches: Sequence[Cache], *, seed: int
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
        objectives = [LayerObjective(config.layers, cache.targets, shape) for cache in caches]
    _try(model, objectives, longest=max(cache.manifest.sequence_length for cache in caches))
    model.add_module(ADAPTERS, torch.nn.ModuleList(objectives))
    return objectives


def student_shape(model: PreTrainedModel) -> StudentShape:
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


def _try(model: PreTrainedModel, objectives: Sequence[LayerObjective], *, longest: int) -> None:
    """Tries to record the student's layers, on as many tokens as a row can have, before anything is trained."""
    layers = {
        what: sorted({layer for objective in objectives for layer in getattr(objective, f"{what}_layers")})
        for what in ("hidden", "attention")
    }
    was_training = model.training
    model.eval()
    vocabulary = rows_of(model.get_input_embeddings().weight)
    ids_BS = torch.arange(longest, device=model.device).mul(7919).remainder(max(1, vocabulary))[None]
    with (
        torch.no_grad(),
        runnable_here(model),
        runnable(model),
        recorded(model, hidden=layers["hidden"], attention=layers["attention"]) as activations,
    ):
        model.base_model(input_ids=ids_BS, use_cache=False)
    model.train(was_training)
    check_attention(activations, layers["attention"], model)


def check_trainer(trainer: Any, objectives: Sequence[LayerObjective]) -> None:
    """Raise `RecipeError` or `ModelError` for ways to train in which terms between layers would be wrong, or lost."""
    if not objectives:
        return
    args = trainer.args
    if args.n_gpu > 1:
        raise ModelError("objective.layers need a process for each GPU: launch with torchrun or deepspeed")
    if hasattr(trainer.model, "peft_config") and not trainer.is_deepspeed_enabled:
        raise ModelError(
            "low-rank adapters and objective.layers together need DeepSpeed (TrainingArguments(deepspeed=…)): without it "
            "checkpoints would lack the adapters to the teacher's width"
        )
    segments = {name: least for objective in objectives for name, least in objective.least_segments.items()}
    match, least = max(segments.items(), key=lambda item: item[1])
    one_a_row = any(
        cache.manifest.layout == "documents" for cache in trainer.caches
    )  # segment: packed rows have several
    if one_a_row and args.per_device_train_batch_size < least:
        raise RecipeError(
            f"objective.layers: {match.partition('.')[0]} compares the rows of a micro-batch, which has "
            f"{args.per_device_train_batch_size}; set train.micro_batch to {least} or more"
        )


def check_formed_outside(model: PreTrainedModel, objective: LayerObjective | None) -> None:
    """Raise `ModelError` where adapters would run outside of the forward pass that DDP wraps."""
    if objective is not None and isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise ModelError(
            "this student's logits are formed outside of its output layer; with objective.layers that needs DeepSpeed "
            "(TrainingArguments(deepspeed=…)) in several processes"
        )


@contextmanager
def watched(
    model: PreTrainedModel, objective: LayerObjective | None, *, apart: bool = False
) -> Iterator[Activations | None]:
    """While it is open, what the objective compares of the student is recorded, `apart` from what the student itself goes on
    with if gradients are to be told apart; None where there is no objective."""
    if objective is None:
        yield None
        return
    hidden, attention = objective.hidden_layers, objective.attention_layers
    with recorded(model, hidden=hidden, attention=attention, apart=apart) as activations:
        yield activations


def logged(loss: LayerLossSums) -> dict[str, Tensor]:
    """Its sums by the names that logs give them."""
    return {**loss.terms, **{f"similarity_{layer}": sums for layer, sums in loss.similarity.items()}}


def names_logged(objectives: Sequence[LayerObjective]) -> tuple[str, ...]:
    """All names that `logged` can give, the same in every process."""
    names = [
        name
        for objective in objectives
        for name in (*objective.names, *(f"similarity_{i}" for i in objective.similarities))
    ]
    return tuple(dict.fromkeys(names))


def without_adapters(folder: Path) -> None:
    """Take the adapters' weights out of a saved model, in place; nothing is written where there are none."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    prefix, removed = f"{ADAPTERS}.", 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            weights, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        kept = {name: values for name, values in weights.items() if not name.startswith(prefix)}
        if len(kept) == len(weights):
            continue
        removed += sum(values.nbytes for name, values in weights.items() if name not in kept)
        if kept:
            save_file(kept, path, metadata=metadata)
        else:
            path.unlink()
    if removed:
        _unlist(folder, prefix, removed)


def _unlist(folder: Path, prefix: str, removed_bytes: int) -> None:
    for path in folder.glob("*.safetensors.index.json"):
        index = json.loads(path.read_text(encoding="utf-8"))
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if not name.startswith(prefix)}
        if "total_size" in index.get("metadata", {}):
            index["metadata"]["total_size"] -= removed_bytes
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
