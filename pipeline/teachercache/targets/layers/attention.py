"""Attention maps from queries and keys, and queries and keys from what entered a block. As math, on torch's tensors.

The softmax runs over the keys that a query sees: those of its own segment, up to itself, within the window if there is one.
Heads of grouped-query attention share keys: head h reads key head h · K / H (Ainslie et al., "GQA", 2023).

Shapes: B rows, S tokens, C queries of a chunk, T keys of it, D width, H heads of queries, K of keys and values, E a head's
width, P positions of a rotary table, R its width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Parts = tuple["Tensor", "Tensor", "Tensor | None"]  # queries, keys, values


def log_attention(
    queries_BHCE: Tensor,
    keys_BKSE: Tensor,
    sees_BCS: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Log-probabilities of keys, float32 [B, H, C, S]; -inf where a query does not see.

    With sinks they sum up to less than 1: the rest belongs to no key (as in what transformers returns as attention). A
    query that sees nothing, as padding does, gives a row of zeros in the place of logarithms.
    """
    groups = queries_BHCE.shape[1] // keys_BKSE.shape[1]
    keys_BHSE = keys_BKSE.repeat_interleave(groups, dim=1) if groups > 1 else keys_BKSE
    scores_BHCS = (queries_BHCE.float() @ keys_BHSE.float().transpose(-1, -2)) * scaling
    if softcap is not None:
        scores_BHCS = (scores_BHCS / softcap).tanh() * softcap
    blind_BC = ~sees_BCS.any(-1)
    scores_BHCS = scores_BHCS.masked_fill(~(sees_BCS | blind_BC[..., None])[:, None], -float("inf"))
    total_BHC1 = scores_BHCS.logsumexp(-1, keepdim=True)
    if sinks_H is not None:
        total_BHC1 = total_BHC1.logaddexp(sinks_H.float()[None, :, None, None].expand_as(total_BHC1))
    return (scores_BHCS - total_BHC1).masked_fill(blind_BC[:, None, :, None], 0.0)


ALL = slice(None)


def sees(
    torch: ModuleType, segment_BS: Tensor, *, window: int | None, queries: slice = ALL, keys: slice = ALL
) -> Tensor:
    """Marks the keys that queries see, bool [B, C, T]. `segment_BS` numbers the segments of each row; padding is -1,
    sees nothing and is not seen."""
    queries_BC1, keys_B1T = segment_BS[:, queries, None], segment_BS[:, None, keys]
    place_S: Tensor = torch.arange(segment_BS.shape[1], device=segment_BS.device)
    distance_CT = place_S[queries, None] - place_S[keys]
    near_CT = distance_CT >= 0
    if window is not None:
        near_CT = near_CT & (distance_CT < window)
    return near_CT & (queries_BC1 == keys_B1T) & (queries_BC1 >= 0)


class TaughtAttention(Protocol):
    """One block's attention of a batch, however it is stored: maps of it, or what they are rebuilt from."""

    @property
    def heads(self) -> int:
        """As many maps as there are."""

    @property
    def window(self) -> int | None:
        """Keys that a query sees, itself included."""

    def probabilities(self, part: slice, sees_BCT: Tensor, *, first: int = 0, sinks: bool = False) -> Tensor:
        """Returns the attention of the queries `part`, float32 [B, H, C, T]: 0 where `sees_BCT` (bool) is not, and
        elsewhere a distribution over keys. The keys are as many as that has, from the row's token `first` on. With
        `sinks` it is what is left of a distribution by logits that belong to no key, where the teacher has them."""


@dataclass(frozen=True)
class HeadShape:
    """Shape of one block's attention: how it forms scores from its queries and keys."""

    heads: int
    key_heads: int
    head_width: int
    scaling: float
    window: int | None = None
    softcap: float | None = None

    def to_metadata(self) -> dict[str, Any]:
        """Returns what the file of layers keeps of it."""
        return dict(vars(self))

    @classmethod
    def from_metadata(cls, data: Any) -> HeadShape:
        """Inverse of `to_metadata`; raises `ValueError` for what no attention can be."""
        try:
            shape = cls(**data)
        except TypeError as error:
            raise ValueError(f"an attention is not described as one is ({error})") from None
        counts = (shape.heads, shape.key_heads, shape.head_width, *([] if shape.window is None else [shape.window]))
        if not all(type(count) is int and 0 < count <= 2**20 for count in counts) or shape.heads % shape.key_heads:
            raise ValueError(
                f"an attention has {shape.heads} heads, {shape.key_heads} of keys, {shape.head_width} wide"
            )
        for number in (shape.scaling, *([] if shape.softcap is None else [shape.softcap])):
            if type(number) not in (int, float) or not 0 < number < 1e6:
                raise ValueError("an attention's scaling or soft cap is no positive number")
        return shape


@dataclass(frozen=True)
class BlockEntry:
    """Entry of a block: how it makes queries and keys from the hidden state that enters it: norm, projection, norm of
    heads, rotation.

    `norm` is `rms` (Zhang & Sennrich 2019), `layer` (Ba et al. 2016) or `none`.
    """

    norm: str
    epsilon: float
    head_epsilon: float = 0.0

    def apply(
        self,
        torch: ModuleType,
        arrays: Mapping[str, Tensor],
        hidden_BSD: Tensor,
        position_BS: Tensor,
        shape: HeadShape,
    ) -> Parts:
        """(queries [B, H, S, E], keys [B, K, S, E], values [B, K, S, E] or None), float32, after rotation.

        `arrays`: `norm` [D] and `norm_bias` [D], `query` [H·E, D], `key` [K·E, D], `value` [K·E, D] with `…_bias`,
        `query_norm` and `key_norm` [E], `cos` and `sin` [P, R]; all but query and key may be missing. `position_BS` counts
        from each segment's first token.
        """
        entered_BSD = self._normed(arrays, hidden_BSD.float())
        projected = {}
        for name, count in (("query", shape.heads), ("key", shape.key_heads), ("value", shape.key_heads)):
            if name not in arrays:
                continue
            flat_BSX = entered_BSD @ arrays[name].T
            if f"{name}_bias" in arrays:
                flat_BSX = flat_BSX + arrays[f"{name}_bias"]
            heads_BSHE = flat_BSX.unflatten(-1, (count, shape.head_width))
            if f"{name}_norm" in arrays:
                heads_BSHE = _rms(heads_BSHE, self.head_epsilon) * arrays[f"{name}_norm"]
            projected[name] = heads_BSHE.transpose(1, 2)
        if "cos" in arrays:
            cos_BSR, sin_BSR = (arrays[name][position_BS] for name in ("cos", "sin"))
            for name in ("query", "key"):
                projected[name] = _rotated(torch, projected[name], cos_BSR[:, None], sin_BSR[:, None])
        return projected["query"], projected["key"], projected.get("value")

    def _normed(self, arrays: Mapping[str, Tensor], hidden_BSD: Tensor) -> Tensor:
        if self.norm == "none":
            return hidden_BSD
        if self.norm == "layer":
            hidden_BSD = hidden_BSD - hidden_BSD.mean(-1, keepdim=True)
        normed_BSD = _rms(hidden_BSD, self.epsilon) * arrays["norm"]
        return normed_BSD + arrays["norm_bias"] if "norm_bias" in arrays else normed_BSD


def _rms(values: Tensor, epsilon: float) -> Tensor:
    return values * (values.square().mean(-1, keepdim=True) + epsilon).rsqrt()


def _rotated(torch: ModuleType, heads_BHSE: Tensor, cos_B1SR: Tensor, sin_B1SR: Tensor) -> Tensor:
    """Su et al., "RoFormer", 2021, with a head's two halves rotated into each other; what lies beyond R stays."""
    width = cos_B1SR.shape[-1]
    turned, kept = heads_BHSE[..., :width], heads_BHSE[..., width:]
    low, high = turned[..., : width // 2], turned[..., width // 2 :]
    turned = turned * cos_B1SR + torch.cat([-high, low], dim=-1) * sin_B1SR
    whole: Tensor = torch.cat([turned, kept], dim=-1) if kept.shape[-1] else turned
    return whole
