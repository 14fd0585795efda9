"""What every recorded result says about itself: the code that made it and the machine that it ran on."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path


def provenance() -> dict[str, str]:
    """`commit` (with `-dirty` where files differ from it) and `device`."""
    return {"commit": commit(), "device": device()}


def commit() -> str:
    """The checkout's commit."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def device() -> str:
    """Processor and the cores that this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.machine()
    return f"{name}, {len(os.sched_getaffinity(0))} cores"
