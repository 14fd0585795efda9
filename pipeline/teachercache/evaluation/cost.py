"""Costs of a model: latency, throughput, memory.

All timed passes run one sequence length over real tokens, logits of every token included, without a key-value cache:
the pass that scores or prefills a prompt. Models are compared at the same length, batch and thread count.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from teachercache.tokens.rows import TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LONGEST_TIMED = 128
WARM_UP_PASSES = 2
MEGABYTE = 10**6


def timed_tokens(row: TokenRow) -> torch.Tensor:
    """Tokens for the timed passes: the first `LONGEST_TIMED` of a row, [1, L]."""
    return torch.from_numpy(row.input_ids_S[:LONGEST_TIMED].astype(np.int64))[None]


def speed(model: PreTrainedModel, input_ids_1L: torch.Tensor, *, batch_rows: int) -> dict[str, float | int]:
    """`latency_ms`: median over passes at batch 1; `throughput`: positions/s at `throughput_batch` rows."""
    input_ids_1L = input_ids_1L.to(model.device)
    input_ids_BL = input_ids_1L.repeat(batch_rows, 1)
    latency = _median_seconds(lambda: model(input_ids=input_ids_1L, use_cache=False), budget=1.5)
    batched = _median_seconds(lambda: model(input_ids=input_ids_BL, use_cache=False), budget=2.0)
    return {
        "latency_ms": latency * 1e3,
        "latency_tokens": input_ids_1L.shape[1],
        "throughput": input_ids_BL.numel() / batched,
        "throughput_batch": batch_rows,
    }


def _median_seconds(forward: Callable[[], object], *, budget: float, least: int = 5, most: int = 30) -> float:
    """Median time of a pass over as many passes as fit into `budget` seconds, within bounds."""
    seconds: list[float] = []
    with torch.inference_mode():
        for _ in range(WARM_UP_PASSES):
            forward()
        while len(seconds) < least or (len(seconds) < most and sum(seconds) < budget):
            _synchronise()
            start = time.perf_counter()
            forward()
            _synchronise()
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class MemoryMeter:
    """Memory that a model takes. Make it before the model is loaded, and after all code that loading imports.

    On a CPU: what the process's resident set grows by until every weight has been read once (weights may be mapped from
    their file and become resident only then). On a GPU: the most that torch held allocated during a forward pass at
    batch 1, weights and activations.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._before = _resident_bytes()

    def read(self, model: PreTrainedModel, input_ids_1L: torch.Tensor) -> dict[str, float | str]:
        """`memory_mb`, `memory_is` (which of the two) and `weights_mb`: bytes of the parameters and buffers alone."""
        weights = weight_bytes(model) / MEGABYTE
        if self._on_gpu:
            return {"memory_mb": _peak_allocated(model, input_ids_1L), "memory_is": "GPU peak", "weights_mb": weights}
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.detach().sum()
        grown = (_resident_bytes() - self._before) / MEGABYTE
        return {"memory_mb": max(0.0, grown), "memory_is": "resident set", "weights_mb": weights}


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of parameters and buffers; a tied weight counts once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in [*model.parameters(), *model.buffers()]
    }
    return sum(storages.values())


def _peak_allocated(model: PreTrainedModel, input_ids_1L: torch.Tensor) -> float:
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        model(input_ids=input_ids_1L.to(model.device), use_cache=False)
    return torch.cuda.max_memory_allocated() / MEGABYTE


def _resident_bytes() -> int:
    """The process's resident set, after freed memory went back to the system."""
    gc.collect()
    if sys.platform != "linux":
        import psutil

        return psutil.Process().memory_info().rss
    with contextlib.suppress(AttributeError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * mmap.PAGESIZE
