"""Which errors say that a device has no memory left."""

from __future__ import annotations

import gc

# What libraries below torch say when they cannot allocate; under pressure they cannot even make their handles.
ALLOCATION_FAILED = (
    "out of memory",  # CUDA's own, HIP's, and what a failed kernel launch reports
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "can't allocate memory",  # the CPU's
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of a forward or backward pass means that memory ran out: torch's own type, or the message of a library
    that it calls."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in ALLOCATION_FAILED)


def free_memory() -> None:
    """Give back what nobody holds any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
