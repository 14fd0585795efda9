"""Records activations of a model's blocks: hidden states, and queries and keys of attention. Teacher and student alike.

Layers are counted the same way everywhere, in the teacher, in a cache and in a student:

    hidden 0      the embeddings, as they enter block 1
    hidden i      what block i gives, for i from 1 to the number of blocks: the residual stream, before any final norm
    attention i   of block i, which reads hidden i - 1

(`output_hidden_states` of transformers gives the same, but for its last entry, which is behind the final norm.) Attention is
seen where transformers hands queries, keys and values to its kernels: after rotary embeddings, whatever the architecture,
and with the fast kernel still on. They are recorded with their graph, so that a student can be trained by them.

Shapes: B rows, S tokens, D width, H heads of queries, K of keys and values, E a head's width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from teachercache.errors import ModelError
from teachercache.targets.layers.attention import log_attention, sees

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

ADAPTERS = "distillation"  # the module that training adds to a student: none of its own layers


@dataclass(frozen=True, eq=False)
class Heads:
    """One block's attention, before its scores are formed."""

    queries_BHSE: Tensor
    keys_BKSE: Tensor
    values_BKSE: Tensor
    scaling: float
    window: int | None = None  # keys that a query sees, itself included
    softcap: float | None = None
    sinks_H: Tensor | None = None  # a logit of each head that takes mass and belongs to no key
    output_BSHE: Tensor | None = None  # what the kernel made of it


@dataclass(eq=False)
class Activations:
    """Recorded activations of a batch, by layer."""

    hidden: dict[int, Tensor] = field(default_factory=dict)  # [B, S, D]
    attention: dict[int, Heads] = field(default_factory=dict)
    rotary: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # cos and sin that a block was given
    # Where they are recorded `apart`: what the model itself went on with, hidden [B, S, D], or queries, keys and values.
    onward: dict[tuple[str, int], tuple[Tensor, ...]] = field(default_factory=dict)


def path_of_blocks(model: PreTrainedModel) -> str | None:
    """Name of the one list of blocks, e.g. `model.layers` or `transformer.h`; None where there is no such list."""
    from torch.nn import ModuleList

    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [name for name, module in model.named_modules() if isinstance(module, ModuleList) and len(module) == count]
    lists = [name for name in lists if name.partition(".")[0] != ADAPTERS]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return outermost[0] if len(outermost) == 1 else None


def blocks_of(model: PreTrainedModel) -> Any:
    """The model's blocks in order. Raises `ModelError` where they are not in one list."""
    path = path_of_blocks(model)
    if path is None:
        raise ModelError(
            f"{type(model).__name__} does not keep its blocks in one list, so neither its hidden states nor its attention can "
            "be recorded; its logits can: leave out the layers"
        )
    return model.get_submodule(path)


@contextmanager
def recorded(
    model: PreTrainedModel, *, hidden: Sequence[int] = (), attention: Sequence[int] = (), apart: bool = False
) -> Iterator[Activations]:
    """While it is open, what the chosen layers of the model hold is recorded; each forward pass replaces the one before.

    With `apart` the model goes on with other tensors of the same numbers (`Activations.onward`), so that gradients which
    reach what was recorded through the model arrive apart from those of losses on it.

    Raises `ModelError` where the model's blocks are not in one list, or there is no such layer.
    """
    activations = Activations()
    if not hidden and not attention:
        yield activations
        return
    blocks = blocks_of(model)
    check_layers("hidden", hidden, first=0, count=len(blocks), model=type(model).__name__)
    check_layers("attention", attention, first=1, count=len(blocks), model=type(model).__name__)
    handles = [*_hidden_hooks(blocks, hidden, activations, apart=apart), *_rotary_hooks(blocks, attention, activations)]
    owners = {id(module): layer for layer in attention for module in blocks[layer - 1].modules()}
    try:
        with _seen_by_kernels(model, owners, activations, apart=apart):
            yield activations
    finally:
        for handle in handles:
            handle.remove()


def check_layers(what: str, layers: Sequence[int], *, first: int, count: int, model: str) -> None:
    """Raise `ModelError` for a layer that a model of `count` blocks does not have."""
    for layer in layers:
        if not first <= layer <= count:
            start = "0 (the embeddings)" if first == 0 else str(first)
            raise ModelError(f"{what}: there is no layer {layer}; {model} has layers {start} to {count}")


def _hidden_hooks(blocks: Any, layers: Sequence[int], activations: Activations, *, apart: bool) -> list[Any]:
    def onward(layer: int) -> Tensor:
        hidden_BSD = activations.hidden[layer]
        activations.onward["hidden", layer] = (hidden_BSD.view_as(hidden_BSD),)
        return activations.onward["hidden", layer][0]

    def entered(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        activations.hidden[0] = args[0] if args else kwargs["hidden_states"]
        if not apart:
            return None
        return ((onward(0), *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": onward(0)})

    def left(layer: int) -> Callable[[Any, Any, Any], Any]:
        def hook(_: object, __: object, output: Any) -> Any:
            activations.hidden[layer] = output[0] if isinstance(output, tuple) else output
            if not apart:
                return None
            return (onward(layer), *output[1:]) if isinstance(output, tuple) else onward(layer)

        return hook

    hooks = [blocks[layer - 1].register_forward_hook(left(layer)) for layer in layers if layer > 0]
    if 0 in layers:
        hooks.append(blocks[0].register_forward_pre_hook(entered, with_kwargs=True))
    return hooks


def _rotary_hooks(blocks: Any, layers: Sequence[int], activations: Activations) -> list[Any]:
    def entered(layer: int) -> Callable[[Any, Any, dict[str, Any]], None]:
        def hook(_: object, __: object, kwargs: dict[str, Any]) -> None:
            rotary = kwargs.get("position_embeddings")
            if isinstance(rotary, tuple) and len(rotary) == 2:
                activations.rotary[layer] = rotary

        return hook

    return [blocks[layer - 1].register_forward_pre_hook(entered(layer), with_kwargs=True) for layer in layers]


@contextmanager
def _seen_by_kernels(
    model: PreTrainedModel, owners: dict[int, int], activations: Activations, *, apart: bool
) -> Iterator[None]:
    """Stand between the model and its attention kernel, as transformers' `AttentionInterface` provides for."""
    if not owners:
        yield
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions

    name = model.config.get_text_config()._attn_implementation
    before = functions._local_mapping.get(name)

    def kernel(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        layer = owners.get(id(module))
        onward: tuple[Any, ...] = (query, key, value)
        if apart and layer is not None:
            onward = activations.onward["attention", layer] = tuple(tensor.view_as(tensor) for tensor in onward)
        result = _kernel_of(name, module, before)(module, *onward, *args, **kwargs)
        if layer is not None:
            activations.attention[layer] = Heads(
                query,
                key,
                value,
                scaling=kwargs.get("scaling") or query.shape[-1] ** -0.5,
                window=kwargs.get("sliding_window"),
                softcap=kwargs.get("softcap"),
                sinks_H=kwargs.get("s_aux"),
                output_BSHE=result[0],
            )
        return result

    functions[name] = kernel
    try:
        yield
    finally:
        if before is None:
            del functions[name]
        else:
            functions[name] = before


def _kernel_of(name: str, module: Any, before: Any) -> Any:
    from transformers.modeling_utils import AttentionInterface

    if before is not None:
        return before
    if name in AttentionInterface._global_mapping:
        return AttentionInterface._global_mapping[name]
    return sys.modules[type(module).__module__].eager_attention_forward  # `eager` is each model's own


TRIED_QUERIES = 64  # the last ones: those that a window hides most from
TOLERANCE = 0.02  # of the largest number that a kernel gives; half-precision kernels round


def check_recorded(recorded_layers: Activations, layers: Sequence[int], model: PreTrainedModel) -> None:
    """Raise `ModelError` where some layer's attention did not pass by."""
    for layer in layers:
        if layer not in recorded_layers.attention:
            raise ModelError(
                f"the attention of block {layer} of {type(model).__name__} does not go through transformers' attention "
                "interface, so it cannot be recorded; hidden states and logits can: leave `attention` out"
            )


def check_attention(recorded_layers: Activations, layers: Sequence[int], model: PreTrainedModel) -> None:
    """Raise `ModelError` where some layer's attention did not pass by, or is another than what was recorded of it.

    Softmax over the recorded scores must give what the kernel gave: else a mask hides more than the window that the kernel
    was told of (chunked or bidirectional attention), or the kernel leaves something out (a soft cap). What was recorded should
    be of a single sequence, as long as any that follows.
    """
    check_recorded(recorded_layers, layers, model)
    name = type(model).__name__
    for layer in layers:
        error = _error_of_kernel(recorded_layers.attention[layer])
        if not error <= TOLERANCE:
            raise ModelError(
                f"the attention of block {layer} of {name} is not what its queries and keys say (off by {error:.1%}): its mask "
                f"hides more than a window, or its kernel leaves something out; load it with attention: eager, or leave "
                "`attention` out: hidden states and logits can be stored"
            )


def _error_of_kernel(heads: Heads) -> float:
    """Returns the largest error of the last queries' outputs, as a part of the largest output."""
    import torch

    if heads.output_BSHE is None:
        return float("inf")
    length = heads.queries_BHSE.shape[2]
    start = max(0, length - TRIED_QUERIES)
    segment_BS = torch.zeros(1, length, dtype=torch.int64, device=heads.queries_BHSE.device)
    seen_BCS = sees(torch, segment_BS, window=heads.window, queries=slice(start, None))
    shares_BHCS = log_attention(
        heads.queries_BHSE[:1, :, start:], heads.keys_BKSE[:1], seen_BCS, scaling=heads.scaling, softcap=heads.softcap,
        sinks_H=heads.sinks_H,
    ).exp()  # fmt: skip
    groups = heads.queries_BHSE.shape[1] // heads.values_BKSE.shape[1]
    values_BHSE = heads.values_BKSE[:1].float().repeat_interleave(groups, dim=1)
    expected_BCHE = (shares_BHCS @ values_BHSE).transpose(1, 2)
    found_BCHE = heads.output_BSHE[:1, start:].float()
    if found_BCHE.shape != expected_BCHE.shape:
        return float("inf")
    return float((found_BCHE - expected_BCHE).abs().max() / expected_BCHE.abs().max().clamp_min(1e-9))
