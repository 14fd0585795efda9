"""The k largest of many, without a look at each row's every value for each of them.

A row is cut into interleaved groups. The k largest values lie within the k groups that have the largest maxima: one pass
finds the maxima, and only those groups are looked at closely (against `torch.topk`: tests/bench/capture_cost.py).

Shapes: N positions, V vocabulary, k wanted, W tokens of a group, G groups, E tokens of the groups looked at.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def largest(torch: ModuleType, values_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `torch.topk(values, k, dim=-1)`: values, largest first (NaN before all), and their indices, [N, k] each.

    Among equal values any may be taken.
    """
    vocabulary = values_NV.shape[1]
    width = 1 << (vocabulary // max(k, 1)).bit_length() // 2  # about sqrt(V / k): the two selections cost alike
    groups = vocabulary // width
    if width == 1 or groups < k:
        largest: tuple[Tensor, Tensor] = torch.topk(values_NV, k, dim=-1)
        return largest
    maxima_NG = values_NV[:, : groups * width].view(-1, width, groups).amax(1)
    chosen_Nk = torch.topk(maxima_NG, k, dim=-1, sorted=False)[1]
    steps_W1 = torch.arange(0, groups * width, groups, device=values_NV.device)[:, None]
    ids_NE = (chosen_Nk[:, None] + steps_W1).flatten(1)
    if groups * width < vocabulary:  # the few that make no group
        rest_R = torch.arange(groups * width, vocabulary, device=values_NV.device)
        ids_NE = torch.cat([ids_NE, rest_R.expand(len(ids_NE), -1)], dim=1)
    largest_Nk, at_Nk = torch.topk(values_NV.gather(1, ids_NE), k, dim=-1)
    return largest_Nk, ids_NE.gather(1, at_Nk)
