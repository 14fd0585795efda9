"""Measurements one after another, each in a process of its own, and what users quote of them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teachercache import errors
from teachercache.config import LOCAL_COPIES, LOCAL_COPIES_BYTES
from teachercache.errors import JobFailed, TeachercacheError
from teachercache.files import same_imports

Table = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class ModelSpec:
    """A model to measure. `auto` is the checkpoint's own precision."""

    model: str
    revision: str | None = None
    dtype: str = "auto"
    attention: str | None = None
    trust_remote_code: bool = False


def evaluate(
    *,
    cache: str | Path,
    teacher: str | ModelSpec,
    student_before: str | ModelSpec | None,
    student_after: str | ModelSpec,
    student_cross_entropy: str | ModelSpec | None = None,
    rows: int | None = None,
    batch: int = 8,
    device: str | None = None,
    local: Path = LOCAL_COPIES,
    local_bytes: int = LOCAL_COPIES_BYTES,
    progress: Callable[[str], None] | None = None,
) -> Table:
    """Measure the models on the held-out rows of a cache: `teacher`, `student_before` (if given), `student_cross_entropy` (if
    given: one that learned without the teacher) and `student_after`, each as `teachercache.evaluation.measure` prints it.

    Students get two figures more: `quality_kept`, their next-token accuracy over the teacher's, and `speed_up`, the
    teacher's latency over theirs. `rows` limits the held-out rows; `local` and
    `local_bytes` are those of `Cache.open`; `progress` is told what is being measured, and at the end on what.
    Raises what the measuring process raised, and `JobFailed` when it died.
    """
    models = {
        "teacher": teacher,
        "student_before": student_before,
        "student_cross_entropy": student_cross_entropy,
        "student_after": student_after,
    }
    table: Table = {}
    options = {"rows": rows, "batch": batch, "device": device, "local": local, "local_bytes": local_bytes}
    for role, model in models.items():
        if model is None:
            continue
        spec = model if isinstance(model, ModelSpec) else ModelSpec(model)
        if progress:
            progress(f"measuring the {role.replace('_', ' ')}: {spec.model}")
        table[role] = _measure_apart(spec, cache, **options)
    if progress:
        teachers = table["teacher"]
        progress(f"evaluated on {teachers['positions']:,} held-out positions in {teachers['rows']:,} rows of {cache}")
    for role in table.keys() - {"teacher"}:
        table[role] |= _compared(table[role], table["teacher"])
    return table


def _compared(student: dict[str, Any], teacher: dict[str, Any]) -> dict[str, float | None]:
    # Shares of tokens do not compare where tokens are other ones.
    comparable = teacher["accuracy"] and student["tokenizer"] == teacher["tokenizer"]
    return {
        "quality_kept": student["accuracy"] / teacher["accuracy"] if comparable else None,
        "speed_up": teacher["latency_ms"] / student["latency_ms"],
    }


def _measure_apart(spec: ModelSpec, cache: str | Path, **options: Any) -> dict[str, Any]:
    """Run the measuring module; its stderr passes through."""
    arguments = {**dataclasses.asdict(spec), "cache": str(cache), **options}
    command = [sys.executable, "-m", "teachercache.evaluation.measure"]
    for name, value in arguments.items():
        if value is True:
            command.append(f"--{name.replace('_', '-')}")
        elif value not in (None, False):
            command.append(f"--{name.replace('_', '-')}={value}")
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=same_imports())
    lines = finished.stdout.strip().splitlines()
    if finished.returncode == 0 and lines:
        figures: dict[str, Any] = json.loads(lines[-1])
        return figures
    raise failure_of(spec.model, finished.returncode, lines)


def failure_of(model: str, status: int, lines: list[str]) -> TeachercacheError:
    """The measuring process's own error, or a `JobFailed` for one that died."""
    try:
        error = json.loads(lines[-1])["error"]
        known: TeachercacheError = getattr(errors, error["type"])(error["message"])
        return known
    except (IndexError, KeyError, TypeError, ValueError):
        died = "was killed, most likely for want of memory" if status in (-9, 137) else f"ended with status {status}"
        return JobFailed(f"the process that measures {model} {died}; what it said is above")
