"""The main job at the size of a laptop: precompute → init-student → train → evaluate, each as its own process; on request a
second train, of the same student in the same steps without the teacher, to compare with.

Separate processes are the point: what trains never holds the teacher. Each stage is the command that a user would type,
and can be run again by itself with the recipe that is left in the output folder.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.text import Text

from teachercache.config import Recipe, load_recipe
from teachercache.errors import JobFailed, UserError

LAYERS = "keep:8"
ROLES = ("teacher", "student_before", "student_cross_entropy", "student_after")
HEADER = (
    "# `teachercache quickstart` wrote this. With comments: jobs/recipes/quickstart.yaml, in the package recipes/.\n"
)


def run_quickstart(out: Path, *, compare: bool = False, overrides: Sequence[str], console: Console) -> dict[str, Any]:
    """Run the four stages in `out`, and with `compare` the training without the teacher; returns what `--json` prints. Running
    it again resumes."""
    recipe_file, recipe = write_recipe(out, overrides)
    seconds: dict[str, float] = {}
    cached = _stage(["precompute", str(recipe_file)], seconds, console)
    if arguments := student_arguments(out, recipe):
        _stage(["init-student", *arguments], seconds, console)
        _marker(out).write_text(json.dumps(_made_of(recipe)), encoding="utf-8")
    trained = _stage(["train", str(recipe_file)], seconds, console)
    beside = []
    if compare:
        alone = out / "run-ce"
        settings = [f"train.output={alone}", "objective.alpha=0"]
        arguments = [part for setting in settings for part in ("-s", setting)]
        _stage(["train", str(recipe_file), *arguments], seconds, console, name="train-cross-entropy")
        beside = ["--cross-entropy", str(alone)]
    table = _stage(["evaluate", str(recipe_file), *beside], seconds, console)
    return {
        "cache": cached["cache"],
        "student": trained["student"],
        "recipe": str(recipe_file),
        "positions": cached["positions"],
        "bytes_per_position": cached["bytes_per_position"],
        "steps": trained["steps"],
        "zero_stage": trained["zero_stage"],
        "seconds": seconds,
        **{role: table[role] for role in roles_of(table)},
    }


def roles_of(result: Mapping[str, Any]) -> list[str]:
    """The models that were measured, in the table's order."""
    return [role for role in ROLES if role in result]


def write_recipe(out: Path, overrides: Sequence[str]) -> tuple[Path, Recipe]:
    """The quickstart recipe with everything below `out`, written there as a recipe of its own."""
    text = resources.files("teachercache").joinpath("recipes/quickstart.yaml").read_text(encoding="utf-8")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "recipe.yaml"
    data = yaml.safe_load(text)
    for section, key in ((data, "cache"), (data["student"], "model"), (data["train"], "output")):
        section[key] = str(out / section[key].removeprefix("runs/quickstart/"))
    _write_yaml(path, data)
    recipe = load_recipe(path, overrides)
    if overrides:
        _write_yaml(path, recipe.model_dump(mode="json"))
    return path, recipe


def _write_yaml(path: Path, data: dict[str, Any]) -> None:
    path.write_text(HEADER + yaml.safe_dump(data, sort_keys=False, allow_unicode=True), encoding="utf-8")


def student_arguments(out: Path, recipe: Recipe) -> list[str]:
    """Arguments of `init-student`; none when the student is there, made of the same layers of the same teacher.

    A student elsewhere than in `out` is the user's own: it is used as it is and never overwritten.
    """
    assert recipe.teacher is not None and recipe.student is not None
    student = Path(recipe.student.model)
    arguments = [recipe.teacher.model, "--layers", LAYERS, "--out", str(student)]
    if not (student / "config.json").is_file():
        return arguments
    if student != out / "student-init" or _read_marker(out) == _made_of(recipe):
        return []
    return [*arguments, "--overwrite"]


def _made_of(recipe: Recipe) -> dict[str, str]:
    assert recipe.teacher is not None
    return {"model": recipe.teacher.model, "layers": LAYERS}


def _marker(out: Path) -> Path:
    return out / "student-init.json"


def _read_marker(out: Path) -> Any:
    try:
        return json.loads(_marker(out).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _stage(
    arguments: list[str], seconds: dict[str, float], console: Console, *, name: str | None = None
) -> dict[str, Any]:
    """Run one command with `--json`; its progress goes to our stderr. Its errors become ours. `name`: that of its seconds."""
    console.rule(Text(f"teachercache {shlex.join(arguments)}", style="bold"), align="left")
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "teachercache", *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    seconds[name or arguments[0]] = round(time.perf_counter() - start, 1)
    result = json.loads(done.stdout) if done.stdout.strip() else {}
    if done.returncode == UserError.exit_status:
        raise UserError(f"{arguments[0]}: {result.get('error', 'failed')}")
    if done.returncode:
        raise JobFailed(f"{arguments[0]} failed with exit status {done.returncode}: {result.get('error', 'see above')}")
    return result


def next_commands(result: dict[str, Any]) -> Text:
    """Suggests what to try next, for people."""
    recipe, cache = shlex.quote(result["recipe"]), shlex.quote(str(result["cache"]))
    total = sum(result["seconds"].values())
    again = f"  teachercache train {recipe} -s train.output={shlex.quote(str(Path(result['recipe']).parent))}"
    without = f"{again}/run-ce -s objective.alpha=0            # without the teacher; `--compare` shows it beside"
    lines = "\n".join(
        [
            f" The student is a plain Hugging Face folder: {result['student']}",
            "\nTry next (activate the environment first: source .venv/bin/activate):",
            f"  teachercache inspect {cache} --row held-out:0      # what the teacher thought, token by token",
            f"  teachercache verify {cache}                        # every byte against its digest",
            f"{again}/run-t2 -s objective.temperature=2      # another temperature, the same cache",
            *(() if "student_cross_entropy" in result else (without,)),
        ]
    )
    return Text.assemble("\n", (f"Done in {total / 60:.1f} min.", "bold"), lines)
