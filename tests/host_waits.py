"""A stand-in for a GPU's profile where there is none: counts the calls after which the host would have to wait for the device.

On a GPU, work is queued and the host runs ahead, until it asks for a value, or for a shape that depends on values. These calls
are the same on a CPU, where they cost nothing.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

READS = {"cpu", "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__"}
SHAPES = {
    "nonzero",
    "argwhere",
    "masked_select",
    "unique",
    "_unique2",
    "unique_consecutive",
    "equal",
    "allclose",
    "bincount",
}


class HostWaits(TorchFunctionMode):
    """While it is open, counts by name; `sum(waits.counts.values())` is what a step costs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS | SHAPES or (name in ("where", "nonzero") and len(args) == 1):
            self.counts[name] += 1
        elif name in ("__getitem__", "__setitem__") and _has_mask(args[1]):
            self.counts[f"{name} by a mask"] += 1
        elif name == "to" and _names_the_cpu((*args[1:], *(kwargs or {}).values())):
            self.counts["to the cpu"] += 1
        elif name == "repeat_interleave" and len(args) > 1 and isinstance(args[1], torch.Tensor):
            self.counts[name] += "output_size" not in (kwargs or {})
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """Waits of all."""
        return sum(self.counts.values())


def _has_mask(index: Any) -> bool:
    items = index if isinstance(index, tuple) else (index,)
    return any(isinstance(item, torch.Tensor) and item.dtype == torch.bool for item in items)


def _names_the_cpu(arguments: Any) -> bool:
    """By name: the device of another tensor is, here, the CPU, and stands for the GPU."""
    return any(argument == "cpu" for argument in arguments if isinstance(argument, str))
