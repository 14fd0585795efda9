"""What a run folder says about a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CLOCKED = {"positions_per_second", "waiting_for_data", "eval_seconds"}


def log_of(run: Path) -> list[dict[str, Any]]:
    """Log records of a run without what a clock put there."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in record.items() if key not in CLOCKED} for record in records]


def losses_of(run: Path) -> list[float]:
    """Training loss by logging window."""
    return [record["loss"] for record in log_of(run) if "loss" in record]
