"""Blocks of positions small enough for a processor's cache, and the passes that the loss makes over them.

A block of consecutive rows is read and written in place; other blocks are gathered first. Within a block every
exponential is taken once: at T = 2, 4, 8 … `exp(z)` is `exp(z / T)` squared again and again.

Shapes: R rows of the flat logits, L columns, the first V of which are the vocabulary and the other P padding; N positions, C
of them in a block; k head.
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

    def __init__(
        self, size: int, columns: int, *, vocabulary_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._new = functools.partial(torch.empty, size, columns, dtype=dtype, device=device)
        self._of_teacher = functools.partial(torch.empty, size, vocabulary_size, dtype=dtype, device=device)

    @functools.cached_property
    def values_CL(self) -> Tensor:
        """For values that cannot be formed in the gradient's own memory."""
        return self._new()

    @functools.cached_property
    def spare_CL(self) -> Tensor:
        """For a second power of them."""
        return self._new()

    @functools.cached_property
    def share_CV(self) -> Tensor:
        """For a dense teacher."""
        return self._of_teacher()


@dataclass
class Block:
    """C positions: their logits, and the buffer in which their gradient is formed."""

    part: slice  # of the N positions
    logits_CL: Tensor
    values_CL: Tensor  # the gradient's own memory where it can be, else scratch
    gradient_RL: Tensor | None  # where `values_CL` has to be copied to in the end
    rows: slice | Tensor  # of R
    scratch: Scratch
    vocabulary_size: int

    @property
    def spare_CL(self) -> Tensor:
        """Scratch for exp(z) where T != 1."""
        return self.scratch.spare_CL[: len(self.logits_CL)]

    @property
    def logits_CV(self) -> Tensor:
        """Logits of the vocabulary."""
        return self.logits_CL[:, : self.vocabulary_size]

    @property
    def values_CV(self) -> Tensor:
        """Values of the vocabulary."""
        return self.values_CL[:, : self.vocabulary_size]

    @property
    def logits_CP(self) -> Tensor:
        """Logits of padding, in the type of `values_CL`; often there is none, and P = 0."""
        return self.logits_CL[:, self.vocabulary_size :].to(self.values_CL.dtype)

    @property
    def values_CP(self) -> Tensor:
        """Values of padding."""
        return self.values_CL[:, self.vocabulary_size :]

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
        squarings, spare_CV, values_CV = squarings_of(power), self.spare_CL[:, : self.vocabulary_size], self.values_CV
        if squarings:
            torch.mul(values_CV, values_CV, out=spare_CV)
            for _ in range(squarings - 1):
                spare_CV.mul_(spare_CV)
        else:
            torch.pow(values_CV, power, out=spare_CV)
        return spare_CV.sum(-1, keepdim=True)

    def scale(self, values_scale_C1: Tensor, spare_scale_C1: Tensor | None) -> None:
        """values = values · scale + spare · scale, padding included."""
        self.values_CL.mul_(values_scale_C1)
        if spare_scale_C1 is not None:
            self.values_CL.addcmul_(self.spare_CL, spare_scale_C1)

    def add_at(self, ids_Ck: Tensor, amounts_Ck: Tensor) -> None:
        """values += amounts at some tokens."""
        self.values_CL.scatter_add_(1, ids_Ck, amounts_Ck)

    def write_back(self) -> None:
        """Bring a gradient that was formed in scratch to its place, in the logits' own type."""
        if self.gradient_RL is not None:
            self.gradient_RL[self.rows] = self.values_CL.to(self.gradient_RL.dtype)


def blocks(
    logits_RL: Tensor,
    gradient_RL: Tensor | None,
    *,
    positions_N: Tensor,
    vocabulary_size: int,
    dtype: torch.dtype,
    block_bytes: int | None,
    consecutive: bool = False,
) -> Iterator[Block]:
    """Cut N positions (rising indices into R) into blocks. Scratch is shared: use up a block before taking the next.

    Positions that are known to be `consecutive`, 0, 1, … N - 1, are not asked for: on a GPU that would wait for all that is
    under way there.
    """
    columns = logits_RL.shape[1]
    size = block_rows(columns, dtype, logits_RL.device, block_bytes=block_bytes)
    size = min(size, max(1, len(positions_N)))
    scratch = Scratch(size, columns, vocabulary_size=vocabulary_size, dtype=dtype, device=logits_RL.device)
    on_host_N = range(len(positions_N)) if consecutive else positions_N.tolist()
    for start in range(0, len(positions_N), size):
        part = slice(start, min(start + size, len(positions_N)))
        first, count = on_host_N[start], part.stop - start
        in_a_row = on_host_N[part.stop - 1] - first == count - 1
        rows = slice(first, first + count) if in_a_row else positions_N[part]
        own_memory = gradient_RL is not None and in_a_row and gradient_RL.dtype == dtype
        yield Block(
            part=part,
            logits_CL=logits_RL[rows],
            values_CL=gradient_RL[rows] if gradient_RL is not None and own_memory else scratch.values_CL[:count],
            gradient_RL=None if own_memory else gradient_RL,
            rows=rows,
            scratch=scratch,
            vocabulary_size=vocabulary_size,
        )


def block_rows(columns: int, dtype: torch.dtype, device: torch.device, *, block_bytes: int | None = None) -> int:
    """Positions of a block, by default one that suits the device."""
    if block_bytes is None:
        on_cpu = device.type == "cpu"
        block_bytes = CPU_BLOCK_BYTES_PER_THREAD * torch.get_num_threads() if on_cpu else DEVICE_BLOCK_BYTES
    return max(1, block_bytes // (columns * dtype.itemsize))


def squarings_of(power: float) -> int:
    """Returns the number of squarings that give this power; 0 where squaring does not give it."""
    squarings = math.log2(power)
    return int(squarings) if squarings > 0 and squarings.is_integer() else 0
