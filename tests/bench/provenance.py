"""Facts that every recorded result has about itself, the code that made it and its machine; and where it goes."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any


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


def add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="a file to record the result in")
    parser.add_argument("--json", action="store_true", help="the result on one line")


def publish(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Print a result, and record it where `--out` says."""
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=None if options.json else 1))
