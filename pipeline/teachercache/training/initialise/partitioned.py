"""Students of which each process holds a part from the first byte (DeepSpeed ZeRO 3, Rajbhandari et al., 2020).

While a configuration of stage 3 is alive, that of `TrainingArguments`, transformers makes a model under `deepspeed.zero.Init`:
each weight is cut up as soon as it is there, and a checkpoint's weights are handed out one by one, from files that are mapped
and not read. So no process ever holds the student, and no device a copy of it (tests/bench/zero3_memory.py).

Such a weight has no elements but those of `ds_tensor`, and its shape is `ds_shape`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

HALF = (torch.bfloat16, torch.float16)


def is_partitioned(model: torch.nn.Module) -> bool:
    """Tells whether this process holds only a part of the model."""
    return any(hasattr(weight, "ds_id") for weight in model.parameters())


def rows_of(weight: Any) -> int:
    """First dimension of the whole weight."""
    return int(getattr(weight, "ds_shape", weight.shape)[0])


@contextmanager
def runnable(model: torch.nn.Module) -> Iterator[None]:
    """While it is open, a student that DeepSpeed does not run yet can be called, by all processes at once: the weights of a
    block are gathered when it begins and given up when it ends. Costs a block's memory; nothing for a student that is whole."""
    if not is_partitioned(model):
        yield
        return
    gathered: list[ExitStack] = []

    def gather(module: Any, weights: list[Any]) -> None:
        import deepspeed

        gathered.append(stack := ExitStack())
        stack.enter_context(deepspeed.zero.GatheredParameters(weights))

    with ExitStack() as hooks:
        for module, weights in _units(model):
            before = module.register_forward_pre_hook(lambda module, _, weights=weights: gather(module, weights))
            after = module.register_forward_hook(lambda *_: gathered.pop().close(), always_call=True)
            hooks.callback(before.remove)
            hooks.callback(after.remove)
        yield


def _units(module: Any) -> Iterator[tuple[Any, list[Any]]]:
    """Modules, and the weights that are gathered while they run: blocks of a list whole, since some read their parts' weights
    by themselves; of other modules their own."""
    own_weights = [weight for weight in module.parameters(recurse=False) if hasattr(weight, "ds_id")]
    if own_weights:
        yield module, own_weights
    for child in module.children():
        if not isinstance(child, torch.nn.ModuleList):
            yield from _units(child)
            continue
        for block in child:
            weights = [weight for weight in block.parameters() if hasattr(weight, "ds_id")]
            if weights:
                yield block, weights


def exact_buffers(model: torch.nn.Module) -> None:
    """Bring buffers that `zero.Init` made in half precision back to what a whole student has, in place: float32,
    and computed in it. Rotary frequencies in bf16 would turn far positions by the wrong angle."""
    if is_partitioned(model):
        with torch.no_grad():
            _exact_buffers(model, model)


def _exact_buffers(module: Any, owner: Any) -> None:
    from transformers import PreTrainedModel

    owner = module if isinstance(module, PreTrainedModel) else owner
    coarse = [name for name, buffer in module.named_buffers(recurse=False) if buffer.dtype in HALF]
    for name in coarse:
        module._buffers[name] = module._buffers[name].float()
    if not module._non_persistent_buffers_set.isdisjoint(coarse):
        owner._init_weights(module)  # computes what no checkpoint holds, and leaves weights that were loaded
    for child in module.children():
        _exact_buffers(child, owner)


def like_partitioned(model: torch.nn.Module) -> None:
    """Bring what was added since to the type of weights that are partitioned, in place: DeepSpeed casts only students that are
    whole."""
    types = {weight.dtype for weight in model.parameters() if hasattr(weight, "ds_id")}
    if len(types) != 1:
        return
    [dtype] = types
    for weight in model.parameters():
        if not hasattr(weight, "ds_id") and weight.is_floating_point():
            weight.data = weight.data.to(dtype)
