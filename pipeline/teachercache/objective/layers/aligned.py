"""Terms between layers across tokenizers: at aligned tokens, where teacher and student have read the same bytes.

What each side holds there becomes a row of aligned tokens alone, and every term works as it does within one vocabulary; of
attention that is each query's share of the keys at aligned tokens.

Shapes: B rows, S tokens of the student, A aligned tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from teachercache.errors import ModelError

if TYPE_CHECKING:
    from teachercache.models.activations import Heads

# Of aligned tokens: index in the student's row; place in the teacher's segment; whether it is the first of either's segment.
STUDENT, PLACES, FIRST = "student", "teacher", "first"


def are_aligned(layers: Mapping[str, Tensor]) -> bool:
    """Tells whether a batch's layers are those of aligned tokens."""
    return STUDENT in layers


def at_tokens(values: Tensor, index_BA: Tensor, *, dim: int) -> Tensor:
    """Entries along dimension `dim` (1, or 2 behind heads) at each row's tokens."""
    if dim == 1:
        return values.gather(1, index_BA[..., None].expand(*index_BA.shape, values.shape[-1]))
    index = index_BA[:, None, :, None].expand(len(values), values.shape[1], index_BA.shape[1], values.shape[-1])
    return values.gather(2, index)


def aligned_heads(heads: Heads, index_BA: Tensor, *, layer: int) -> Heads:
    """The student's attention among aligned tokens. Raises `ModelError` for one with a window, which counts tokens."""
    if heads.window is not None and heads.window < heads.queries_BHSE.shape[2]:
        raise ModelError(
            f"attention {layer} of the student sees a window of {heads.window} tokens, which are not the teacher's; match "
            "hidden states across tokenizers, or layers whose attention sees all"
        )
    queries_BHAE, keys_BKAE, values_BKAE = (
        at_tokens(vectors, index_BA, dim=2) for vectors in (heads.queries_BHSE, heads.keys_BKSE, heads.values_BKSE)
    )
    return replace(
        heads, queries_BHSE=queries_BHAE, keys_BKSE=keys_BKAE, values_BKSE=values_BKAE, window=None, output_BSHE=None
    )
