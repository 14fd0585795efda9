"""The prediction of `estimate` beside what the job then takes.

    python tests/bench/estimate_against_job.py WORK_FOLDER [--recipe FILE …] [--seconds 30] [--out FILE] [--json]

Each recipe is estimated and then precomputed, both as a user does it, in processes of their own. Compared are positions, bytes
of all files of the cache, and processor seconds of all processes of the job, Ray's among them. Time on the clock stands
beside them: it means something on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from provenance import add_output_options, provenance, publish

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"
POLL_SECONDS = 0.2


def timed(*arguments: str) -> tuple[dict[str, Any], float, dict[str, float]]:
    """Run a command with `--json`; its document, seconds on the clock, and processor seconds by what the process is."""
    command = [sys.executable, "-m", "teachercache", *arguments, "--json"]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    worked: dict[tuple[int, float], tuple[str, float]] = {}
    while process.poll() is None:
        worked |= dict(_working(psutil.Process(process.pid)))
        time.sleep(POLL_SECONDS)
    seconds = time.perf_counter() - began
    assert process.stdout is not None
    printed = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: {printed}")
    by_name: dict[str, float] = {}
    for name, value in worked.values():
        by_name[name] = by_name.get(name, 0.0) + value
    return json.loads(printed), seconds, by_name


def _working(root: psutil.Process) -> list[tuple[tuple[int, float], tuple[str, float]]]:
    """Processor seconds, so far, of a process and all below it."""
    found = []
    try:
        for process in [root, *root.children(recursive=True)]:
            times = process.cpu_times()
            found.append(((process.pid, process.create_time()), (_name(process, root), times.user + times.system)))
    except psutil.Error:
        pass  # one has ended meanwhile: what it had worked at the last look stays
    return found


def _name(process: psutil.Process, root: psutil.Process) -> str:
    if process == root:
        return "driver"
    title = " ".join(process.cmdline()[:1])
    return title if title.startswith("ray::") else "Ray's own"


def compared(recipe: Path, work: Path, *, seconds: float, overrides: list[str]) -> dict[str, Any]:
    """Prediction and outcome of a recipe, and their ratios."""
    cache = work / recipe.stem / "cache"
    options = ["--set", f"cache={cache}", *(part for override in overrides for part in ("--set", override))]
    predicted, estimate_seconds, _ = timed("estimate", str(recipe), "--seconds", str(seconds), *options)
    done, job_seconds, by_name = timed("precompute", str(recipe), *options)
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    outcome = {"positions": done["positions"], "bytes": size, "processor_seconds": round(sum(by_name.values()), 1)}
    said = {
        "positions": predicted["positions"],
        "bytes": predicted["bytes"],
        "processor_seconds": round(3600 * predicted["processor_hours"], 1),
    }
    return {
        "predicted": said,
        "happened": outcome,
        "predicted_over_happened": {name: round(said[name] / outcome[name], 3) for name in said},
        "clock_seconds": {
            "predicted": round(3600 * predicted["hours"], 1),
            "happened": round(job_seconds, 1),
            "of_estimate": round(estimate_seconds, 1),
        },
        "break_even_runs": predicted["break_even_runs"],
        "sampling_error": predicted["sampling_error"],
        "sample": predicted["sample"],
        "processor_seconds_by_process": {name: round(value, 1) for name, value in sorted(by_name.items())},
        "job": {name: done[name] for name in ("teacher_seconds", "start_up_seconds", "positions_per_second")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--recipe", type=Path, action="append", help="default: quickstart.yaml and smoke/r1_qwen.yaml")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY.PATH=VALUE")
    add_output_options(parser)
    options = parser.parse_args()
    recipes = options.recipe or [RECIPES / "quickstart.yaml", RECIPES / "smoke" / "r1_qwen.yaml"]
    result: dict[str, Any] = {**provenance(), "seconds": options.seconds, "overrides": options.overrides}
    result["recipes"] = {
        recipe.stem: compared(recipe, options.work, seconds=options.seconds, overrides=options.overrides)
        for recipe in recipes
    }
    publish(result, options)


if __name__ == "__main__":
    main()
