"""The record of a logging window, as log.jsonl and trackers get it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from teachercache.training.callbacks.meter import LoggingWindow


def training_record(
    window: LoggingWindow, schedule: Mapping[str, Any], *, divergence_name: str | None
) -> dict[str, Any]:
    """Losses by term, means over positions; `schedule` holds the values of the window's last step. Without a name
    there is no divergence beside the terms."""
    divergence = {} if divergence_name is None or schedule["alpha"] == 0 else {divergence_name: window.divergence}
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
