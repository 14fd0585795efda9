"""Blocks of positions small enough for a processor's cache, and the passes that the loss makes over them.

A block of consecutive rows is read and written in place; other blocks are gathered first. Within a block every
exponential is taken once: at T = 2, 4, 8 … `exp(z)` is `exp(z / T)` squared again and again.

Shapes: R rows of the flat logits, L columns, of which V are the vocabulary; N positions, C of them in a block; k head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# What a core's own cache holds, about: 1.5-3 MiB in all is fastest with 2 threads and 1 MiB of L2 each, and up to 8 MiB
# costs little more. Enough rows for every thread matter as much: passes are shared out by rows.
CPU_BLOCK_BYTES_PER_THREAD = 2 * 2**20
DEVICE_BLOCK_BYTES = 128 * 2**20


class Scratch:
    """Buffers of one block, each made when first needed."""

    def __init__(self, size: int, vocabulary_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._new = functools.partial(torch.empty, size, vocabulary_size, dtype=dtype, device=device)

    @functools.cached_property
    def values_CV(self) -> Tensor:
        """For values that cannot be formed in the gradient's own memory."""
        return self._new()

    @functools.cached_property
    def spare_CV(self) -> Tensor:
        """For a second power of them."""
        return self._new()

    @functools.cached_property
    def share_CV(self) -> Tensor:
        """For a dense teacher."""
        return self._new()


@dataclass
class Block:
    """C positions: their logits, and the buffer in which their gradient is formed."""

    part: slice  # of the N positions
    logits_CV: Tensor
    values_CV: Tensor  # the gradient's own memory where it can be, else scratch
    gradient_RL: Tensor | None  # where `values_CV` has to be copied to in the end
    rows: slice | Tensor  # of R
    scratch: Scratch

    @property
    def spare_CV(self) -> Tensor:
        """Scratch for exp(z) where T != 1."""
        return self.scratch.spare_CV[: len(self.logits_CV)]

    def exponentiate(self, head_ids_Ck: Tensor, temperature: float) -> Tensor:
        """values = exp(z / T - largest) outside the head and 0 inside; returns the largest z / T outside it, [C, 1].

        Shifting by the largest logit of the *tail* keeps its sum exact however small its share is; 1 - Σ_head would
        cancel, and a shift by the head's largest logit would underflow.
        """
        values_CV = self.values_CV
        if self.logits_CV.dtype == values_CV.dtype:
            torch.mul(self.logits_CV, 1 / temperature, out=values_CV)
        else:
            values_CV.copy_(self.logits_CV).mul_(1 / temperature)
        values_CV.scatter_(1, head_ids_Ck, -math.inf)
        largest_C1 = values_CV.amax(-1, keepdim=True).clamp_min_(torch.finfo(values_CV.dtype).min)
        values_CV.sub_(largest_C1).exp_()
        return largest_C1

    def raise_to(self, power: float) -> Tensor:
        """spare = values ** power = exp(z - power · largest); returns its sum, [C, 1]."""
        squarings, spare_CV = squarings_of(power), self.spare_CV
        if squarings:
            torch.mul(self.values_CV, self.values_CV, out=spare_CV)
            for _ in range(squarings - 1):
                spare_CV.mul_(spare_CV)
        else:
            torch.pow(self.values_CV, power, out=spare_CV)
        return spare_CV.sum(-1, keepdim=True)

    def scale(self, values_scale_C1: Tensor, spare_scale_C1: Tensor | None) -> None:
        """values = values · scale + spare · scale."""
        self.values_CV.mul_(values_scale_C1)
        if spare_scale_C1 is not None:
            self.values_CV.addcmul_(self.spare_CV, spare_scale_C1)

    def add_at(self, ids_Ck: Tensor, amounts_Ck: Tensor) -> None:
        """values += amounts at some tokens."""
        self.values_CV.scatter_add_(1, ids_Ck, amounts_Ck)

    def write_back(self) -> None:
        """Bring a gradient that was formed in scratch to its place, in the logits' own type."""
        if self.gradient_RL is not None:
            self.gradient_RL[self.rows, : self.values_CV.shape[1]] = self.values_CV.to(self.gradient_RL.dtype)


def blocks(
    logits_RL: Tensor,
    gradient_RL: Tensor | None,
    *,
    positions_N: Tensor,
    vocabulary_size: int,
    dtype: torch.dtype,
    block_bytes: int | None,
) -> Iterator[Block]:
    """Cut N positions (rising indices into R) into blocks. Scratch is shared: use up a block before taking the next."""
    size = block_rows(vocabulary_size, dtype, logits_RL.device, block_bytes=block_bytes)
    size = min(size, max(1, len(positions_N)))
    scratch = Scratch(size, vocabulary_size, dtype, logits_RL.device)
    on_host_N = positions_N.cpu()
    for start in range(0, len(positions_N), size):
        part = slice(start, min(start + size, len(positions_N)))
        first, count = int(on_host_N[start]), part.stop - start
        consecutive = int(on_host_N[part.stop - 1]) - first == count - 1
        rows = slice(first, first + count) if consecutive else positions_N[part]
        own_memory = gradient_RL is not None and consecutive and gradient_RL.dtype == dtype
        values_CL = gradient_RL[rows] if gradient_RL is not None and own_memory else scratch.values_CV[:count]
        yield Block(
            part=part,
            logits_CV=logits_RL[rows][:, :vocabulary_size],
            values_CV=values_CL[:, :vocabulary_size],
            gradient_RL=None if own_memory else gradient_RL,
            rows=rows,
            scratch=scratch,
        )


def block_rows(
    vocabulary_size: int, dtype: torch.dtype, device: torch.device, *, block_bytes: int | None = None
) -> int:
    """Positions of a block, by default one that suits the device."""
    if block_bytes is None:
        on_cpu = device.type == "cpu"
        block_bytes = CPU_BLOCK_BYTES_PER_THREAD * torch.get_num_threads() if on_cpu else DEVICE_BLOCK_BYTES
    return max(1, block_bytes // (vocabulary_size * dtype.itemsize))


def squarings_of(power: float) -> int:
    """How often to square for this power; 0 where squaring does not give it."""
    squarings = math.log2(power)
    return int(squarings) if squarings > 0 and squarings.is_integer() else 0
