"""A teacher that captures layers, rows for it, and what transformers returns for a row alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from teacher.rows import make_row
from teachercache.targets import StoredTargets, TopK
from teachercache.teacher import Teacher
from teachercache.tokens.rows import TokenRow

V = 300
LOGITS = TopK(4, (1.0,), "float32", V)
ROWS = [make_row(length, seed=seed, vocabulary=V) for seed, length in enumerate((30, 12, 45, 2))]
SAMPLE = [make_row(60, seed=100 + seed, vocabulary=V) for seed in range(12)]


def prepared(model: Any, *, layout: str = "documents", **kinds: Any) -> Teacher:
    teacher = Teacher.of(model, targets=StoredTargets(LOGITS, **kinds), layout=layout, pad_id=0)
    teacher.prepare(SAMPLE, positions_per_batch=256, longest=64)
    return teacher


def alone(model: Any, one: TokenRow, *, start: int = 0, stop: int | None = None) -> Any:
    """A row, or a segment of it, by itself, with everything that transformers returns."""
    ids_BS = torch.from_numpy(one.input_ids_S[start:stop].astype(np.int64))[None]
    with torch.no_grad():
        return model(ids_BS, use_cache=False, output_hidden_states=True, output_attentions=True)


def divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    """KL in nats, mean over queries and heads."""
    gap = torch.where(expected > 0, expected * (expected.clamp_min(1e-38).log() - found.clamp_min(1e-38).log()), 0.0)
    return float(gap.sum(-1).mean())
