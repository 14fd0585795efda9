"""Temperature-softened distributions from a head of logits and the tail's log-partition.

With the largest logit as zero, a position stores the k largest logits z_1 … z_k and, for each temperature T of a grid,
the tail's log-partition t(T) = log Σ exp(z_i / T) over the tokens *outside* the head. Then

    log Z(T) = log(Σ_head exp(z_i / T) + exp(t(T)))

so that head probabilities and the tail's mass are exact at every T of the grid, and always sum to one. Storing the tail
rather than log Z keeps a small tail exact: 1 - Σ_head cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from teachercache.errors import CacheError


def grid_index(grid: Sequence[float], temperature: float) -> int:
    """Index of `temperature` in the grid; raises `CacheError` naming the grid."""
    for index, value in enumerate(grid):
        if math.isclose(value, temperature, rel_tol=1e-6):
            return index
    held = ", ".join(f"{value:g}" for value in grid)
    raise CacheError(
        f"temperature {temperature:g} is not on this cache's grid ({held}); train at one of these, "
        "or precompute with it in targets.logits.temperatures"
    )


def check_positive(temperature: float) -> None:
    """For kinds that are read at any temperature: raises `CacheError` for T <= 0."""
    if not temperature > 0:
        raise CacheError(f"temperature {temperature:g} is not positive; use T > 0")


def softened(
    head_logits_Nk: Any, tail_log_partition_NG: Any, grid: Sequence[float], temperature: float, xp: ModuleType = np
) -> tuple[Any, Any]:
    """The teacher's distribution at `temperature`: log-probabilities of the head [N, k] and of the whole tail [N].

    `xp` is the module that the arrays belong to, numpy or torch; computation is in the arrays' own precision, so cast
    float16 columns to float32 first. An empty tail (k = vocabulary) has log-probability -inf. Source of the softening:
    Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2015.
    """
    tail_N = tail_log_partition_NG[:, grid_index(grid, temperature)]
    scaled_Nk = head_logits_Nk / temperature
    # The largest logit is 0, so the sum lies in [1, k]: no overflow, no cancellation.
    log_z_N = xp.logaddexp(xp.log(xp.exp(scaled_Nk).sum(-1)), tail_N)
    return scaled_Nk - log_z_N[:, None], tail_N - log_z_N
