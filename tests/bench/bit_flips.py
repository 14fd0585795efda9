"""Single flipped bits in a cache: found before the data is used, or not read at all.

    python tests/bench/bit_flips.py [--flips 1000] [--of verify,training,…] [--seed 0] [--minutes M] [--json]

A tiny cache with a sketch, hidden states and an alignment is made; its files with a digest are flipped in turn, one random
bit each time. `verify` has to find every flip. Training, evaluation, alignment and fidelity run without it, on the same
flips, and each has to end in one line that says so before anything comes out, or come out as if nothing had been flipped,
bit by bit: then it has not read that file. Anything else is counted as `missed`, and is a fault.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from builders import aligned, other_student, sentences, tiny_cache, tiny_student, tiny_teacher

TARGETS = {
    "logits": {"kind": "head+sketch", "k": 6, "rank": 24, "step": 0.05, "calibration_positions": 200},
    "hidden": {"layers": [1]},
}
PART = 100  # flips a process


@dataclass
class Parts:
    """Caches that consumers work with: `whole` is the undamaged one; students have the teacher's tokenizer, or another."""

    folder: Path
    whole: Path
    teacher: Path
    student: Path
    other: Path
    models: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def made_in(cls, folder: Path) -> Parts:
        teacher = tiny_teacher(folder / "teacher")
        whole = tiny_cache(folder / "made", teacher=teacher, texts=sentences(24), targets=TARGETS)
        other = other_student(folder / "other", dropout=0.0)
        aligned(whole, other)
        return cls(folder, whole, teacher, tiny_student(folder / "student", dropout=0.0), other)

    def model(self, name: Path) -> Any:
        from teachercache.models.loading import load_causal_lm

        if str(name) not in self.models:
            self.models[str(name)] = load_causal_lm(str(name))
        return self.models[str(name)]


def _train(parts: Parts, cache: Path, student: Path) -> str:
    from rich.console import Console

    from teachercache.config import parse_recipe
    from teachercache.training.job.train import run_training

    run = parts.folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    across = {"across": [{"match": "projected-kl"}]} if student == parts.other else {}
    recipe = parse_recipe(
        {
            "cache": str(cache),
            "student": {"model": str(student)},
            "objective": {"alpha": 0.7, "temperature": 2.0, **across},
            "train": {
                "output": str(run), "global_batch": 8, "micro_batch": 4, "epochs": 1, "loader_workers": 0, "trackers": [],
            },
        },
        origin="bit_flips",
    )  # fmt: skip
    try:
        run_training(recipe, console=Console(file=io.StringIO()))
    finally:
        came_out = [*run.glob("checkpoint-*"), *run.glob("student")]
        exported = _digest(run / "student") if came_out else ""
    return exported


def training(parts: Parts, cache: Path) -> str:
    """With the teacher's tokenizer."""
    return _train(parts, cache, parts.student)


def training_across(parts: Parts, cache: Path) -> str:
    """Through the alignment."""
    return _train(parts, cache, parts.other)


def evaluation(parts: Parts, cache: Path) -> str:
    """Measures that `evaluate` takes of a student on the held-out rows."""
    from teachercache.cache import Cache
    from teachercache.evaluation.quality import held_out_rows, quality

    opened = Cache.open(cache)
    rows = held_out_rows(opened, limit=None)
    return json.dumps(quality(parts.model(parts.student), rows, opened, batch_rows=8))


def alignment(parts: Parts, cache: Path) -> str:
    """The alignment, made anew."""
    shutil.rmtree(cache / "alignments", ignore_errors=True)
    return _digest(aligned(cache, parts.other))


def fidelity(parts: Parts, cache: Path) -> str:
    """The teacher against what is stored, on all rows."""
    from teachercache.cache import Cache
    from teachercache.evaluation.fidelity import run_fidelity

    measured = run_fidelity(Cache.open(cache), teacher=str(parts.teacher), rows=10**6)
    return json.dumps({key: value for key, value in measured.items() if key != "cache"})


CONSUMERS: dict[str, Callable[[Parts, Path], str]] = {
    "training": training,
    "training through the alignment": training_across,
    "evaluation": evaluation,
    "alignment": alignment,
    "fidelity": fidelity,
}


def _digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    parts = [(path.relative_to(folder).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
    return json.dumps(parts)


def files_with_digests(cache: Path) -> list[str]:
    """All files of a cache but its card."""
    found = [path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file()]
    return sorted(name for name in found if name != "README.md")


def outcome(parts: Parts, name: str, cache: Path, *, expected: str) -> str:
    """`found`, `unread` or `missed`."""
    from teachercache.errors import TeachercacheError

    try:
        came_out = CONSUMERS[name](parts, cache)
    except TeachercacheError as error:
        assert "\n" not in str(error), error
        run = parts.folder / "run"
        return "missed" if "training" in name and [*run.glob("checkpoint-*"), *run.glob("student")] else "found"
    return "unread" if came_out == expected else "missed"


def flip(parts: Parts, cache: Path, file: str, generator: random.Random) -> str:
    """Make `cache` a copy with one other bit in `file`; returns where."""
    shutil.rmtree(cache, ignore_errors=True)
    shutil.copytree(parts.whole, cache)
    data = bytearray((cache / file).read_bytes())
    place, bit = generator.randrange(len(data)), generator.randrange(8)
    data[place] ^= 1 << bit
    (cache / file).write_bytes(data)
    return f"{file}, byte {place}, bit {bit}"


def measure(
    folder: Path, *, flips: int, names: list[str], seed: int = 0, minutes: float = float("inf")
) -> dict[str, Any]:
    """Counts by consumer, and where flips were missed; of as many flips as are done within so many minutes."""
    from teachercache.cache import verify

    parts, generator, began = Parts.made_in(folder), random.Random(seed), time.perf_counter()
    cache, files = folder / "cache", files_with_digests(parts.whole)
    expected = {}
    for name in names:
        if name != "verify":
            shutil.rmtree(cache, ignore_errors=True)
            shutil.copytree(parts.whole, cache)
            expected[name] = CONSUMERS[name](parts, cache)
    counts = {name: {"found": 0, "unread": 0, "missed": 0} for name in names}
    missed: list[str] = []
    done = 0
    while done < flips and time.perf_counter() - began < 60 * minutes:
        done += 1
        where = flip(parts, cache, generator.choice(files), generator)
        for name in names:
            if name == "verify":
                result = "found" if verify(cache) else "missed"
            else:
                result = outcome(parts, name, cache, expected=expected[name])
            counts[name][result] += 1
            if result == "missed":
                missed.append(f"{name}: {where}")
    seconds = round(time.perf_counter() - began)
    return {"flips": done, "files": len(files), "counts": counts, "missed": missed, "seconds": seconds}


def measure_in_parts(*, flips: int, names: list[str], seed: int, minutes: float) -> dict[str, Any]:
    """The same, `PART` flips a process: training leaves threads of its process group behind in the process that it ran in."""
    began = time.perf_counter()
    whole: dict[str, Any] = {"flips": 0, "files": 0, "counts": {name: Counter() for name in names}, "missed": []}
    for part, first in enumerate(range(0, flips, PART)):
        left = minutes - (time.perf_counter() - began) / 60
        if left <= 0:
            break
        with tempfile.TemporaryDirectory() as folder:
            asked = {"flips": min(PART, flips - first), "names": names, "seed": seed + part, "minutes": left}
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                done = process.submit(measure, Path(folder), **asked).result()
        whole["flips"] += done["flips"]
        whole["files"] = max(whole["files"], done["files"])
        whole["missed"] += done["missed"]
        for name in names:
            whole["counts"][name].update(done["counts"][name])
        print(f"{whole['flips']} of {flips} flips, {len(whole['missed'])} missed", file=sys.stderr)
    return {**whole, "seconds": round(time.perf_counter() - began)}


def main() -> None:
    from provenance import add_output_options, provenance, publish

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--of", default=",".join(["verify", *CONSUMERS]), help="consumers, by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    add_output_options(parser)
    options = parser.parse_args()
    names = options.of.split(",")
    measured = measure_in_parts(flips=options.flips, names=names, seed=options.seed, minutes=options.minutes)
    command = f"python tests/bench/bit_flips.py --flips {options.flips} --seed {options.seed}"
    publish({"command": command, **provenance(), **measured}, options)
    if measured["missed"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
