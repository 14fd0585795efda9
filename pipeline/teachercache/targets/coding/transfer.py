"""Transfer of results from a teacher's device to the host: in one copy, for which the host waits once.

A GPU's results that are fetched one by one make it wait each time, and each passes through a buffer of the driver's.

Shapes: N positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


def to_host(torch: ModuleType, taken: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Tensors of one device, [N, …] each, as numpy arrays. From a GPU they come packed, through pinned memory."""
    if all(values.device.type == "cpu" for values in taken.values()):
        return {name: values.numpy() for name, values in taken.items()}
    # The widest first: then each begins at a multiple of its own width.
    names = sorted(taken, key=lambda name: -taken[name].element_size())
    packed = torch.cat([taken[name].reshape(-1).view(torch.uint8) for name in names])
    return unpacked(_fetched(torch, packed), {name: taken[name] for name in names})


def _fetched(torch: ModuleType, packed: Tensor) -> Tensor:
    on_host: Tensor = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    on_host.copy_(packed, non_blocking=True)
    torch.cuda.current_stream(packed.device).synchronize()
    return on_host


def unpacked(on_host: Tensor, like: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Arrays that lie one after the other, as those of `like`."""
    arrays, start = {}, 0
    for name, values in like.items():
        stop = start + math.prod(values.shape) * values.element_size()
        arrays[name] = on_host[start:stop].view(values.dtype).view(values.shape).numpy()
        start = stop
    return arrays
