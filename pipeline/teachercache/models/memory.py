"""Recognises errors which say that a device has no memory left."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

# What libraries below torch say when they cannot allocate.
ALLOCATION_FAILED = (
    "out of memory",  # CUDA's own, HIP's, and what a failed kernel launch reports
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUSPARSE_STATUS_ALLOC_FAILED",
    "CUFFT_ALLOC_FAILED",
    "can't allocate memory",  # the CPU's
)
# Under pressure they cannot even make their handles, find no algorithm whose workspace there is room for, or fail where they
# ask how much there is, and do not say why; a library that does not fit its driver or its input says the same.
UNEXPLAINED = (
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_NOT_INITIALIZED",
    "CUSOLVER_STATUS_NOT_INITIALIZED",
    "CUSPARSE_STATUS_NOT_INITIALIZED",
    "Unable to find a valid cuDNN algorithm",
    "GET was unable to find an engine",
    "NVML_SUCCESS == r INTERNAL ASSERT FAILED",
)
LITTLE_BYTES = 2**29  # a handle with its workspace and its kernels takes less


@dataclass(frozen=True)
class NoMemory:
    """In the place of a result that did not fit; `said` is the error's own text."""

    said: str


def device_bytes_free() -> int | None:
    """Returns the bytes that the driver of the GPU in use has left for anyone; None without a GPU, or where the driver
    does not answer any more."""
    import torch

    try:
        return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
    except RuntimeError:
        return None


def is_out_of_memory(error: BaseException, *, bytes_free: Callable[[], int | None] = device_bytes_free) -> bool:
    """Tells whether an error of a forward or backward pass means that memory ran out: torch's own type, or the message
    of a library that it calls. A library that could not start or found no algorithm counts where no more than
    `LITTLE_BYTES` of the device are free."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    if any(message in str(error) for message in ALLOCATION_FAILED):
        return True
    free = bytes_free() if any(message in str(error) for message in UNEXPLAINED) else None
    return free is not None and free <= LITTLE_BYTES


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message; the name of its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def free_memory() -> None:
    """Give back what nobody holds any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
