"""Decoupling of what is shared from what is specific: chosen parts of the student learn from the terms of distillation alone,
others from the task's cross-entropy alone, and the rest from both.

The gradients are masked (gradient routing: Cloud et al., "Gradient Routing: Masking Gradients to Localize Computation in
Neural Networks", 2024), not the forward pass: every part sees what all others compute. One backward pass cannot tell which
term a gradient came from, so each micro-batch takes two *passes*, with the distillation's share of the loss and with the
task's, and a hook on each routed parameter drops what comes in the other's pass. What is shared gets both, which add up to
the gradient that it has without routing. Gradients are dropped before any engine sees them: ZeRO 0-3, DDP and one process
are all the same to it.

A step costs two forward and two backward passes. With dropout the two passes draw masks of their own.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from teachercache.config import RoutingConfig
from teachercache.errors import RecipeError
from teachercache.models.activations import ADAPTERS, blocks_of
from teachercache.objective import LossTerms
from teachercache.objective.logits.operands import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

RoutingPass = Literal["distillation", "task"]
ROUTING_PASSES: tuple[RoutingPass, ...] = get_args(RoutingPass)
ROUTING_PASS = "routing_pass"  # in a micro-batch


class Routing:
    """Masks the gradients of a model's routed parameters, by the `routing_pass` that is set.

    Raises `RecipeError` for a block or name that the model does not have, and for a parameter that is in both lists.
    """

    def __init__(self, model: PreTrainedModel, config: RoutingConfig) -> None:
        self.routing_pass: RoutingPass | None = None
        for routing_pass, parameters in routed_parameters(model, config).items():
            for parameter in parameters:
                parameter.register_hook(self._mask(routing_pass))

    def _mask(self, own_pass: RoutingPass) -> Any:
        def mask(gradient: Tensor) -> Tensor:
            # Zeros, not 0 times the gradient: 0 · inf would be nan.
            return gradient if self.routing_pass in (own_pass, None) else torch.zeros_like(gradient)

        return mask

    @staticmethod
    def presented(batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Each micro-batch once a pass."""
        return [{**batch, ROUTING_PASS: routing_pass} for batch in batches for routing_pass in ROUTING_PASSES]

    @property
    def learns_from_teacher(self) -> bool:
        """Tells whether it is distillation's pass."""
        return self.routing_pass == "distillation"

    def weights(self, weights: Weights) -> Weights:
        """Those at which an objective's total is this pass's terms alone, unweighted."""
        # Where alpha is 0 in a step there is no temperature either.
        return replace(weights, alpha=1.0 if self.learns_from_teacher and weights.alpha else 0.0)

    def of_pass(self, terms: LossTerms, weights: Weights) -> LossTerms:
        """A total at `weights(…)` as its part of the loss; what is logged, terms and positions, comes in one pass each."""
        nothing = torch.zeros_like(terms.ce)
        if self.learns_from_teacher:
            return replace(terms, total=terms.total * weights.alpha, ce=nothing)
        total = terms.total * (1 - weights.alpha)
        return replace(terms, total=total, divergence=nothing, weighed=nothing, positions=0, named={}, counts={})


def routing_of(model: PreTrainedModel, config: RoutingConfig | None, args: TrainingArguments) -> Routing | None:
    """Returns the routing of a recipe that has one, and tells its training loop of the passes."""
    if config is None:
        return None
    present_twice(args)
    return Routing(model, config)


def present_twice(args: TrainingArguments) -> None:
    """To the training loop, and to DeepSpeed, a micro-batch in each pass is one of accumulation."""
    args.gradient_accumulation_steps *= len(ROUTING_PASSES)
    if args.deepspeed:
        steps, settings = args.gradient_accumulation_steps, args.hf_deepspeed_config.config
        settings["gradient_accumulation_steps"] = steps
        settings["train_batch_size"] = args.world_size * args.per_device_train_batch_size * steps


def routed_parameters(model: PreTrainedModel, config: RoutingConfig) -> dict[RoutingPass, list[torch.nn.Parameter]]:
    """The parameters of each list, those that learn at all."""
    names = _names_of(model)
    chosen: dict[RoutingPass, dict[int, str]] = {routing_pass: {} for routing_pass in ROUTING_PASSES}
    for routing_pass in ROUTING_PASSES:
        for item in getattr(config, routing_pass):
            for name in _matching(model, item, names, where=f"objective.routing.{routing_pass}"):
                chosen[routing_pass].setdefault(id(names[name]), name)
    for key, name in chosen["distillation"].items():
        if key in chosen["task"]:
            other = chosen["task"][key]
            subject = f"{name} and {other} are one weight, which" if other != name else name
            raise RecipeError(f"objective.routing: {subject} is in both lists; keep it in one of them")
    return {routing_pass: [names[name] for name in weights.values()] for routing_pass, weights in chosen.items()}


def _names_of(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """All names of what learns, a shared weight under each of its own; adapters are no part of the student."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: weights for name, weights in named if weights.requires_grad and name.partition(".")[0] != ADAPTERS}


def _matching(
    model: PreTrainedModel, item: int | str, names: dict[str, torch.nn.Parameter], *, where: str
) -> list[str]:
    if isinstance(item, int):
        owned = {id(weights) for weights in _layer(model, item, where=where).parameters()}
        parameters = [name for name, weights in names.items() if id(weights) in owned]
    else:
        parameters = [name for name in names if any(fnmatchcase(part, item) for part in _prefixes(name))]
    if parameters:
        return parameters
    known = {part for name in names for part in _prefixes(name)}
    near = difflib.get_close_matches(str(item), sorted(known), n=1, cutoff=0.0)
    raise RecipeError(f"{where}: nothing that learns matches {item}; the nearest name is {near[0]}")


def _layer(model: PreTrainedModel, number: int, *, where: str) -> torch.nn.Module:
    blocks = blocks_of(model)
    if not 0 <= number <= len(blocks):
        raise RecipeError(
            f"{where}: there is no block {number}; the student has blocks 1 to {len(blocks)}, and 0 is its embeddings"
        )
    return blocks[number - 1] if number else model.get_input_embeddings()


def _prefixes(name: str) -> Iterator[str]:
    """The names of a weight and of all modules around it."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        yield ".".join(parts[:count])
