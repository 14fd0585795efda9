"""The main job at the size of a laptop: precompute → init-student → train → evaluate, each as its own process.

Separate processes are the point: what trains never holds the teacher. Each stage is the command that a user would type,
and can be run again by itself with the recipe that is left in the output folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from teachercache.config import Recipe, load_recipe
from teachercache.errors import JobFailed, UserError

LAYERS = "keep:8"
ROLES = ("teacher", "student_before", "student_after")


def run_quickstart(out: Path, *, overrides: Sequence[str], console: Console) -> dict[str, Any]:
    """Run the four stages in `out`; returns what `--json` prints. Running it again resumes."""
    recipe_file, recipe = write_recipe(out, overrides)
    assert recipe.teacher is not None and recipe.student is not None and recipe.train is not None
    seconds: dict[str, float] = {}
    cached = _stage(["precompute", str(recipe_file)], seconds, console)
    if not (Path(recipe.student.model) / "config.json").is_file():
        arguments = [recipe.teacher.model, "--layers", LAYERS, "--out", recipe.student.model]
        _stage(["init-student", *arguments], seconds, console)
    trained = _stage(["train", str(recipe_file)], seconds, console)
    table = _stage(["evaluate", str(recipe_file)], seconds, console)
    return {
        "cache": cached["cache"],
        "student": trained["student"],
        "recipe": str(recipe_file),
        "positions": cached["positions"],
        "bytes_per_position": cached["bytes_per_position"],
        "steps": trained["steps"],
        "zero_stage": trained["zero_stage"],
        "seconds": seconds,
        **{role: table[role] for role in ROLES},
    }


def write_recipe(out: Path, overrides: Sequence[str]) -> tuple[Path, Recipe]:
    """The quickstart recipe with everything below `out`, written there as a recipe of its own."""
    text = resources.files("teachercache").joinpath("recipes/quickstart.yaml").read_text(encoding="utf-8")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "recipe.yaml"
    path.write_text(text.replace("runs/quickstart/", f"{out.as_posix()}/"), encoding="utf-8")
    recipe = load_recipe(path, overrides)
    if overrides:
        path.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    return path, recipe


def _stage(arguments: list[str], seconds: dict[str, float], console: Console) -> dict[str, Any]:
    """Run one command with `--json`; its progress goes to our stderr. Its errors become ours."""
    console.rule(f"[bold]teachercache {' '.join(arguments)}", align="left")
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "teachercache", *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    seconds[arguments[0]] = round(time.perf_counter() - start, 1)
    result = json.loads(done.stdout) if done.stdout.strip() else {}
    if done.returncode == UserError.exit_status:
        raise UserError(f"{arguments[0]}: {result.get('error', 'failed')}")
    if done.returncode:
        raise JobFailed(f"{arguments[0]} failed with exit status {done.returncode}: {result.get('error', 'see above')}")
    return result


def next_commands(result: dict[str, Any]) -> str:
    """What to try next, for people."""
    recipe, cache = result["recipe"], result["cache"]
    total = sum(result["seconds"].values())
    again = f"  teachercache train {recipe} -s train.output={Path(recipe).parent}"
    return "\n".join(
        [
            f"\n[bold]Done in {total / 60:.1f} min.[/] The student is a plain Hugging Face folder: {result['student']}",
            "\nTry next (activate the environment first: source .venv/bin/activate):",
            f"  teachercache inspect {cache} --row held-out:0      # what the teacher thought, token by token",
            f"  teachercache verify {cache}                        # every byte against its digest",
            f"{again}/run-t2 -s objective.temperature=2      # another temperature, the same cache",
            f"{again}/run-ce -s objective.alpha=0            # without the teacher, for comparison",
        ]
    )
