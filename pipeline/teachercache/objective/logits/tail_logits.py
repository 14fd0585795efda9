"""The logits of a teacher's tail, expanded for some positions at a time into one buffer.

A sketch costs a matmul. With few rows that is slow (8 rows take three times as long a row as 128), while the passes over
its result want blocks that fit a processor's cache: so a chunk of several blocks is expanded at once.

Shapes: N positions, C of them in a block, V vocabulary, r sketch directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from teachercache.targets.logits.softened import SketchTail, Tail

CHUNK_POSITIONS = 128


@runtime_checkable
class ExpandingTail(Protocol):
    """A tail that writes into a buffer by itself, with scratch that is worth keeping."""

    def expander(self) -> Callable[[slice, Tensor], None]:
        """Called with some positions and the buffer for their logits, [C, V]."""


class TailLogits:
    """Rows of a tail's logits, for blocks of equal size that come in order; only the last may be smaller."""

    def __init__(self, tail: Tail, *, positions: int, vocabulary_size: int) -> None:
        self._write = tail.expander() if isinstance(tail, ExpandingTail) else partial(write_logits, tail)
        self._positions = positions
        self._vocabulary_size = vocabulary_size
        self._chunk = slice(0, 0)
        self._buffer: Tensor | None = None

    def of(self, part: slice, like: Tensor) -> Tensor:
        """Unnormalised log-probabilities of V tokens, [C, V], in the type of `like`, the caller's to overwrite."""
        if part.stop > self._chunk.stop:
            self._expand(part, like)
        assert self._buffer is not None
        return self._buffer[part.start - self._chunk.start : part.stop - self._chunk.start]

    def _expand(self, part: slice, like: Tensor) -> None:
        block = part.stop - part.start
        size = -(-CHUNK_POSITIONS // block) * block  # whole blocks
        self._chunk = slice(part.start, min(part.start + size, self._positions))
        if self._buffer is None:
            self._buffer = like.new_empty(self._chunk.stop - self._chunk.start, self._vocabulary_size)
        self._write(self._chunk, self._buffer[: self._chunk.stop - self._chunk.start])


@contextmanager
def tensor_cores(device: torch.device) -> Iterator[None]:
    """While it is open, float32 matmuls of a GPU may read their operands in TF32, which is several times as fast; they add up
    in float32. As it was afterwards, and nothing elsewhere.

    TF32 keeps 10 bits of a mantissa: a tail's logits are off by thousandths, where the sketch itself is off by tenths
    (tests/objective/logits/test_tail_logits.py).
    """
    if device.type != "cuda":
        yield
        return
    # The setting of matmuls alone: PyTorch refuses to read the older, common one where a user has set the newer ones.
    matmul: Any = torch.backends.cuda.matmul
    name, value = ("fp32_precision", "tf32") if hasattr(matmul, "fp32_precision") else ("allow_tf32", True)
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def write_logits(tail: Tail, part: slice, logits_CV: Tensor) -> None:
    """`tail.logits(part)` into a buffer; a sketch is computed in it."""
    if not isinstance(tail, SketchTail) or tail.basis_Vr.dtype != logits_CV.dtype:
        logits_CV.copy_(tail.logits(part, torch))
        return
    with tensor_cores(logits_CV.device):
        torch.addmm(tail.offset_V, tail.coefficients_Nr[part], tail.basis_Vr.T, out=logits_CV)
    if tail.softcap is not None:
        logits_CV.div_(tail.softcap).tanh_().mul_(tail.softcap / tail.temperature).add_(tail.bias_V)
