"""Flash kernels on a CPU: the two functions of the kernel library are replaced by what they are documented to compute; all of
transformers' own dispatch, which decides what a kernel is told, is real."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import transformers.modeling_flash_attention_utils as dispatch

FLASH = "flash_attention_2"


def _attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    softmax_scale: float,
    causal: bool,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
) -> Any:
    """Attention of queries [B, S, H, E], and keys and values [B, S, K, E]."""
    groups, length = query.shape[2] // key.shape[2], query.shape[1]
    key, value = (each.repeat_interleave(groups, dim=2).transpose(1, 2) for each in (key, value))
    scores = query.transpose(1, 2) @ key.mT * softmax_scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    back = torch.arange(length)[:, None] - torch.arange(length)
    hidden = back < 0 if causal else torch.zeros_like(back, dtype=torch.bool)
    if window_size[0] >= 0:
        hidden = hidden | (back > window_size[0])
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value).transpose(1, 2)


@contextmanager
def flash_kernels() -> Iterator[Counter[str]]:
    """While it is open, models with attention `FLASH` run on the CPU; counts calls of each kernel."""
    calls: Counter[str] = Counter()

    def dense(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
        calls["dense"] += 1
        return _attention(q, k, v, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap)

    def varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0,
    ):  # fmt: skip
        calls["varlen"] += 1
        settings = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_size, "softcap": softcap}
        parts = pairwise(cu_seqlens_q.tolist())
        return torch.cat([_attention(q[None, a:b], k[None, a:b], v[None, a:b], **settings)[0] for a, b in parts])

    def lazy_import(implementation: Any, attention_wrapper: Any = None, allow_all_kernels: bool = False) -> Any:
        return (dense, varlen, None, None, None), dispatch._lazy_define_process_function(varlen)

    before = dispatch.lazy_import_flash_attention
    dispatch.lazy_import_flash_attention = lazy_import
    try:
        yield calls
    finally:
        dispatch.lazy_import_flash_attention = before


def with_flash(model: Any) -> Any:
    """The model with that attention; loading it so would ask for a GPU."""
    model.config._attn_implementation = FLASH
    model.config.get_text_config()._attn_implementation = FLASH
    return model
