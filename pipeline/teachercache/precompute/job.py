"""The precompute job from a recipe to a committed cache."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from teachercache.config import Recipe
from teachercache.precompute.commit import commit
from teachercache.precompute.plan import Plan, make_plan
from teachercache.shards import Manifest
from teachercache.shards.manifest import MANIFEST, read_manifest


def run_precompute(recipe: Recipe, *, console: Console) -> dict[str, Any]:
    """Run the job, or what is left of it; returns the summary that `--json` prints.

    Running it again when it is finished changes nothing. Raises `UserError` before compute is spent, `JobFailed` when it
    could not be completed; finished units are kept either way.
    """
    start = time.perf_counter()
    console.print(f"[bold]precompute[/] planning: reading {recipe.corpus.source if recipe.corpus else ''} …")
    plan = make_plan(recipe)
    if (plan.folder / MANIFEST).is_file():
        console.print(f"{plan.folder} is complete: nothing to do")
        return summary(plan, read_manifest(plan.folder), Timing(), seconds=time.perf_counter() - start)
    pending = plan.pending()
    if len(pending) < plan.units:
        console.print(f"resuming: {plan.units - len(pending)} of {plan.units} units are done")
    timing = _run(recipe, plan, pending, console)
    manifest = commit(plan)
    result = summary(plan, manifest, timing, seconds=time.perf_counter() - start)
    _print_closing(console, result)
    return result


@dataclass
class Timing:
    """Of the units that this run computed: wall seconds from the first position to the last, and before the first."""

    positions: int = 0
    teacher_seconds: float = 0.0
    working_seconds: float = 0.0
    start_up_seconds: float = 0.0


def _run(recipe: Recipe, plan: Plan, pending: list[int], console: Console) -> Timing:
    timing = Timing()
    if not pending:
        return timing
    console.print("starting Ray and loading the teacher …")
    from teachercache.precompute.cluster import Job, connected, run_units

    began = time.time()
    first = math.inf
    with connected(recipe.precompute), _progress(console) as progress:
        bar = progress.add_task("precompute", total=plan.units, completed=plan.units - len(pending), rate="")
        for done in run_units(Job.of(recipe, plan), pending):
            first = min(first, done["teacher_started"])
            timing.positions += done["positions"]
            timing.teacher_seconds += done["teacher_seconds"]
            timing.working_seconds = time.time() - first
            rate = f"{timing.positions:,} positions, {timing.positions / timing.working_seconds:,.0f}/s"
            progress.update(bar, advance=1, rate=rate)
    timing.start_up_seconds = first - began
    return timing


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("units  {task.fields[rate]}"),
        TimeElapsedColumn(), TimeRemainingColumn(), console=console,
    )  # fmt: skip


def summary(plan: Plan, manifest: Manifest, timing: Timing, *, seconds: float) -> dict[str, Any]:
    """What the job made; `positions_per_second` leaves start-up out."""
    working = timing.working_seconds
    return {
        "cache": str(plan.folder),
        "rows": manifest.rows,
        "positions": manifest.positions,
        "quarantined": manifest.audit.quarantined,
        "audit": vars(manifest.audit),
        "bytes": manifest.shard_bytes,
        "bytes_per_position": manifest.bytes_per_position(),
        "positions_computed": timing.positions,
        "positions_per_second": round(timing.positions / working, 1) if working else 0.0,
        "teacher_seconds": round(timing.teacher_seconds, 2),
        "start_up_seconds": round(timing.start_up_seconds, 2),
        "seconds": round(seconds, 2),
        "fingerprint": manifest.fingerprint,
    }


def _print_closing(console: Console, result: dict[str, Any]) -> None:
    size = result["bytes_per_position"]
    lost = f", {result['quarantined']:,} rows quarantined" if result["quarantined"] else ""
    console.print(
        f"[green]cached[/] {result['rows']:,} rows, {result['positions']:,} positions{lost}, "
        f"{size['logits']:.0f} bytes per position for logits ({size['total']:.0f} in all), "
        f"{result['positions_per_second']:,.0f} positions/s → {result['cache']}"
    )
