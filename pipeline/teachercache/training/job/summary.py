"""Summary of a finished run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from teachercache.training.callbacks.meter import LOGGED_AS


def speed_and_losses(log_history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`losses` of the last logging window, `positions`, and medians of `positions_per_second` and `waiting_for_data` (share
    of the time), over a resumed run too: windows end at checkpoints, so that no step is missing or there twice."""
    windows = [record for record in log_history if "positions_per_second" in record]
    last = windows[-1]
    speed, waiting = (
        statistics.median(window[name] for window in windows if name in window)
        for name in ("positions_per_second", "waiting_for_data")
    )
    divergences = {name: last[name] for name in LOGGED_AS.values() if name in last}
    weighted = (name.removeprefix("weight_") for name in last if name.startswith("weight_"))
    terms = {name: last[name] for name in weighted if name in last}  # between layers, and across tokenizers
    return {
        "losses": {"total": last["loss"], "kl": None, "ce": last["ce"]} | divergences | terms,
        "positions": sum(window["positions"] for window in windows),
        "positions_per_second": round(speed, 1),
        "waiting_for_data": round(waiting, 4),
    }


def closing_line(summary: dict[str, Any]) -> str:
    """The summary of a run, for people."""
    best = summary["best"]
    held_out = f"best held-out loss {best['loss']:.4f} at step {best['step']}" if best else "no held-out loss"
    return (
        f"trained {summary['steps']:,} steps: {summary['rows']:,} rows, {summary['positions']:,} positions at "
        f"{summary['positions_per_second']:,.0f} positions/s (median); {held_out}; student → {summary['student']}"
    )
