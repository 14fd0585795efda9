"""Floating-point operations of a position: of the teacher's forward pass, and of rebuilding its distribution from a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from teachercache.targets import StoredTargets
from teachercache.teacher import Teacher
from teachercache.tokens.rows import TokenRow


def forward_operations(teacher: Teacher, row: TokenRow, *, positions_per_batch: int) -> float:
    """Counted while the teacher reads a row, logits included: of a mixture of experts those that work."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def of_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    with FlopCounterMode(display=False, custom_mapping={flash: of_attention}) as counter:
        teacher.label_nats([row], positions_per_batch=positions_per_batch)
    return float(counter.get_total_flops()) / row.positions


def tail_operations(targets: StoredTargets) -> float:
    """Operations of a product with the basis of the stored logits; 0 for kinds without."""
    basis = getattr(targets.of_logits, "basis", None)
    return 0.0 if basis is None else 2.0 * basis.rank * basis.vocabulary_size
