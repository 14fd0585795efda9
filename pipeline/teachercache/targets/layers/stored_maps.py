"""Stored maps as a batch holds them, and shares of keys from them. As math, on torch's tensors (attention_maps.py stores them).

Codes stay bytes until a chunk of queries is asked for: a micro-batch of 4 rows with 512 tokens and 9 heads holds 9 MB.

Shapes: B rows, S tokens, C queries of a chunk, T keys of it, h heads that are stored, m keys that are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LEVELS = 255
ZERO = 0.25  # what a code of 0 stands for
SMALLEST = 1e-30  # sum of shares: of a query that sees nothing


def shares_of(codes: Tensor) -> Tensor:
    """Shares, not yet divided by their sum: the fourth power."""
    levels = codes.float()
    return (levels.masked_fill(levels == 0, ZERO) / LEVELS).square().square()


@dataclass(frozen=True, eq=False)
class Maps:
    """Codes of every pair, uint8 [B, S, S, h]."""

    codes_BSSh: Tensor
    window: int | None

    @classmethod
    def of(cls, differences_BSSh: Tensor, *, window: int | None) -> Maps:
        """From codes less those of the query before, modulo 256, uint8; 0 where a query does not see."""
        return cls(differences_BSSh.cumsum(1, dtype=differences_BSSh.dtype), window)

    @property
    def heads(self) -> int:
        """That are stored."""
        return int(self.codes_BSSh.shape[-1])

    def probabilities(self, part: slice, sees_BCT: Tensor, *, first: int = 0, sinks: bool = False) -> Tensor:
        """Returns the attention of some queries, float32 [B, h, C, T], over the keys that `sees_BCT` lets them see."""
        codes_BCTh = self.codes_BSSh[:, part, first : first + sees_BCT.shape[-1]]
        return _normalised(shares_of(codes_BCTh.permute(0, 3, 1, 2)).masked_fill(~sees_BCT[:, None], 0.0))


@dataclass(frozen=True, eq=False)
class LargestShares:
    """The m largest keys of each query with their codes, and the rest that all others have together, spread evenly over
    them."""

    codes_BSmh: Tensor  # uint8 [B, S, m + 1, h], 0 for no key; the last one is what all others have
    distance_BSmh: Tensor  # int32 [B, S, m, h]
    position_BS: Tensor  # of each token in its segment
    window: int | None

    @property
    def heads(self) -> int:
        """That are stored."""
        return int(self.codes_BSmh.shape[-1])

    def probabilities(self, part: slice, sees_BCT: Tensor, *, first: int = 0, sinks: bool = False) -> Tensor:
        """Returns the attention of some queries, float32 [B, h, C, T], over the keys that `sees_BCT` lets them see."""
        codes_BhCm = self.codes_BSmh[:, part].permute(0, 3, 1, 2)
        distance_BhCm = self.distance_BSmh[:, part].permute(0, 3, 1, 2)
        query_C1 = (self.position_BS.new_ones(self.position_BS.shape[1]).cumsum(0) - 1)[part, None]
        kept_BhCm = codes_BhCm[..., :-1] > 0
        shares_BhCm = shares_of(codes_BhCm)
        key_BhCm = query_C1 - distance_BhCm - first
        listed_BhCm = shares_BhCm[..., :-1] * (kept_BhCm & (key_BhCm >= 0))
        empty_BhCT = shares_BhCm.new_zeros(*codes_BhCm.shape[:-1], sees_BCT.shape[-1])
        largest_BhCT = empty_BhCT.scatter_add(-1, key_BhCm.clamp_min(0), listed_BhCm)
        seen_BC = self.position_BS[:, part] + 1
        if self.window is not None:
            seen_BC = seen_BC.clamp_max(self.window)
        others_BhC1 = (seen_BC[:, None] - kept_BhCm.sum(-1)).clamp_min(1)[..., None]
        rest_BhCT = (shares_BhCm[..., -1:] / others_BhC1).expand_as(largest_BhCT)
        shares_BhCT = largest_BhCT.where(largest_BhCT > 0, rest_BhCT)
        return _normalised(shares_BhCT.masked_fill(~sees_BCT[:, None], 0.0))


def _normalised(shares_BhCT: Tensor) -> Tensor:
    return shares_BhCT / shares_BhCT.sum(-1, keepdim=True).clamp_min(SMALLEST)
