"""Seeded hidden states, an output layer and a teacher's softened distribution; the largest tensor that a computation makes.

N positions, V tokens, L columns of the output layer (some are padding), D wide, K stored tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from teachercache.targets.logits.softened import SketchTail, Softened, UniformTail

N, V, L, D, RANK, K = 23, 40, 43, 8, 5, 4


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def teacher(tail: str, dtype: torch.dtype = torch.float64) -> Softened:
    log_p_NA = random(3, N, K + 1, dtype=dtype).log_softmax(-1)
    ids_Nk = random(4, N, V).topk(K).indices
    head = Softened(ids_Nk, log_p_NA[:, :K].contiguous(), log_p_NA[:, K].contiguous())
    if tail == "sketch":
        return head.with_tail(
            SketchTail(random(5, N, RANK, dtype=dtype), random(6, V, RANK, dtype=dtype), random(7, V, dtype=dtype))
        )
    return head.with_tail(UniformTail(V, head.head_log_prob_Nk)) if tail == "uniform" else head


def leaves(dtype: torch.dtype = torch.float64, bias: bool = True) -> list[Tensor | None]:
    made = [random(0, N, D, dtype=dtype), random(1, L, D, dtype=dtype), random(2, L, dtype=dtype) if bias else None]
    return [None if values is None else values.requires_grad_() for values in made]


class Largest(TorchDispatchMode):
    """The most elements that any new tensor has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return result
