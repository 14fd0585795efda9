"""The record of a logging window, as log.jsonl and trackers get it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from teachercache.config import ObjectiveConfig
from teachercache.training.callbacks.meter import LOGGED_AS, Window


def training_record(
    window: Window, config: ObjectiveConfig, schedule: Mapping[str, Any], *, across: bool
) -> dict[str, Any]:
    """Losses by term, means over positions; `schedule` is what held in the window's last step. `across`: the student has
    another tokenizer."""
    divergence = {} if across or schedule["alpha"] == 0 else {LOGGED_AS[config.divergence]: window.divergence}
    return {
        "loss": window.total,
        "ce": window.ce,
        **divergence,
        **schedule,
        **window.named,
        "positions": window.positions,
        "positions_per_second": window.positions_per_second,
        "waiting_for_data": window.waiting,
    }
