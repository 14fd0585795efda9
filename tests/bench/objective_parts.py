"""The worth of the objective's parts, each against the same fixed run: same student, same steps, three seeds.

    python tests/bench/objective_parts.py WORK_FOLDER [--steps 150] [--seeds 0 1 2] [--arms …] [--out FILE] [--json]

The quickstart's pair on CPython's documentation (`domain`), and docstrings of numpy and torch (`general`). Arms:

    fixed                                    T = 3, alpha 0.7
    linear, stepwise, cosine, student-loss   other temperatures: an article claims 30 to 40 % fewer steps for the first two
    ratio, uncertainty                       alpha balanced: by the article's rule (it begins after 100 steps), by uncertainty
    two-teachers                             with the teacher's own copy that was trained on the documentation, half and half
    general                                  as many rows of other text: the article claims up to 15 % for matched text
    three-phases                             general at T = 3, domain at T = 2, domain at T = 1

What is compared is the held-out cross-entropy and the KL to the teacher at T = 1 on the domain's text (nats a position) after
the last step, and the first evaluation at which an arm is as good as `fixed` is in the end, by either. All train in bf16.
Stop it at any time: run again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import inspect
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from kd_against_ce import teachercache
from provenance import add_output_options, provenance, publish

from teachercache.quickstart import LAYERS, write_recipe

EVALUATE_EVERY = 10
COPY_STEPS = 24  # of training the second teacher
GENERAL_CHARACTERS = 130_000
MODEL = ["objective.alpha=0.7", "objective.temperature=3"]
RECIPE = ["sequence.length=128", "corpus.limit=20", "train.global_batch=4", "train.micro_batch=4"]
COMMON = ["train.trackers=[]", "train.keep_checkpoints=1", "train.save_every=100000", "train.schedule=constant"]


def arms(work: Path) -> dict[str, list[str]]:
    """Overrides by which each differs from the fixed run."""
    mixed = f"stream.mix=[{{cache: {work / 'general'}}}]"
    phase = "{{name: {0}, share: {1}, temperature: {2}, mix: {{{3}: 1.0}}}}"
    phases = [("general", 0.4, 3, "general"), ("domain", 0.4, 2, "cache"), ("detail", 0.2, 1, "cache")]
    return {
        "fixed": [],
        "linear": ["objective.temperature={schedule: linear, start: 5, rate: 0.8, floor: 1}"],
        "stepwise": ["objective.temperature={schedule: phases, values: [5, 3, 1], at: [0.3333, 0.6667]}"],
        "cosine": ["objective.temperature={schedule: cosine, start: 5, end: 1}"],
        "student-loss": ["objective.temperature={schedule: student-loss, base: 3, most: 6}"],
        "ratio": ["objective.alpha={balance: ratio}"],
        "uncertainty": ["objective.alpha={balance: uncertainty}"],
        "two-teachers": [f"teachers={{caches: [{{cache: {work / 'second'}, weight: 0.5}}]}}"],
        "general": [mixed, "phases=[{name: general, share: 1.0, mix: {general: 1.0}}]"],
        "three-phases": [mixed, f"phases=[{', '.join(phase.format(*each) for each in phases)}]"],
    }


def general_text(path: Path) -> Path:
    """Docstrings of numpy's and torch's public functions, as JSON lines, each once."""
    import numpy
    import torch

    found: dict[str, None] = {}
    for module in (numpy, torch, torch.nn.functional, numpy.linalg, numpy.fft, torch.linalg):
        for name in sorted(dir(module)):
            text = inspect.getdoc(getattr(module, name, None)) if not name.startswith("_") else None
            if text and len(text) > 400:
                found[text] = None
    chosen, size = [], 0
    for text in found:
        if size < GENERAL_CHARACTERS:
            chosen.append(json.dumps({"text": text}))
            size += len(text)
    path.write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return path


def prepare(work: Path) -> Path:
    recipe, parsed = write_recipe(work, [*RECIPE, *MODEL])
    teachercache("precompute", str(recipe))
    student, copy = Path(parsed.student.model), work / "teacher-copy"
    if not (student / "config.json").is_file():
        teachercache("init-student", parsed.teacher.model, "--layers", LAYERS, "--out", str(student))
    general = [
        f"cache={work / 'general'}",
        f"corpus.source={general_text(work / 'general.jsonl')}",
        "corpus.limit=null",
    ]
    _run("precompute", recipe, [*general, "corpus.format=jsonl"])
    if not (work / "second" / "manifest.json").is_file():
        if not (copy / "config.json").is_file():
            teachercache("init-student", parsed.teacher.model, "--layers", "every:1", "--out", str(copy))
        tuned = work / "teacher-tuned"
        alone = [f"student.model={copy}", f"train.output={tuned}", f"train.max_steps={COPY_STEPS}", "objective.alpha=0"]
        _run("train", recipe, [*COMMON, *alone, "train.learning_rate=3.0e-5", "train.evaluate_every=1000"])
        _run("precompute", recipe, [f"cache={work / 'second'}", f"teacher.model={tuned / 'student'}"])
    return recipe


def _run(command: str, recipe: Path, settings: list[str]) -> dict[str, Any]:
    return teachercache(command, str(recipe), *(part for setting in settings for part in ("-s", setting)))


def run(work: Path, recipe: Path, arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run's held-out losses by step. Finished runs are read back, and their checkpoints removed."""
    kept = work / "results" / f"{arm}-{options.steps}-steps-lr{options.learning_rate:g}-seed{seed}.json"
    if not kept.is_file():
        output = work / "runs" / kept.stem
        own = [f"train.max_steps={options.steps}", f"train.seed={seed}", f"train.output={output}"]
        rate = [
            f"train.learning_rate={options.learning_rate}",
            f"train.evaluate_every={EVALUATE_EVERY}",
            "train.precision=bf16",
        ]
        _run("train", recipe, [*COMMON, *own, *rate, *arms(work)[arm]])
        records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
        evaluated = [record for record in records if "eval_loss" in record]
        curve = {name: [_of_domain(record, name) for record in evaluated] for name in ("loss", "kl", "top1_agreement")}
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps({"steps": [record["step"] for record in evaluated], **curve}))
        shutil.rmtree(output)
    found = json.loads(kept.read_text())
    print(f"{kept.stem}: held-out loss {found['loss'][-1]:.4f}", file=sys.stderr)
    return found


def _of_domain(record: dict[str, Any], name: str) -> float:
    """On the held-out rows of the first cache: with several, each has figures of its own."""
    return float(record.get(f"eval_cache0_{name}", record[f"eval_{name}"]))


def compared(runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    """Final figures with mean and spread, and the share of the steps after which the fixed run's end is reached, by seed."""
    ends = {name: [each[name][-1] for each in runs] for name in ("loss", "kl", "top1_agreement")}
    reached = {
        name: [_first(each, name, fixed[name][-1]) for each, fixed in zip(runs, base, strict=True)]
        for name in ("loss", "kl")
    }
    figures = {
        name: {"mean": statistics.mean(values), "spread": max(values) - min(values), "values": values}
        for name, values in ends.items()
    }
    return {**figures, "steps_to_fixed": reached}


def _first(run: dict[str, Any], name: str, end: float) -> int | None:
    """The first evaluated step at which a run is as good."""
    return next((step for step, value in zip(run["steps"], run[name], strict=True) if value <= end), None)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    recipe = prepare(options.work)
    names = list(dict.fromkeys(["fixed", *options.arms]))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for seed in options.seeds:  # seed by seed, so that an unfinished benchmark compares all arms
        for name in names:
            runs[name].append(run(options.work, recipe, name, seed, options))
    return {
        "steps": options.steps, "learning_rate": options.learning_rate, "seeds": options.seeds,
        "evaluate_every": EVALUATE_EVERY,
        "arms": {name: compared(found, runs["fixed"]) for name, found in runs.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(arms(Path())), choices=list(arms(Path())))
    add_output_options(parser)
    options = parser.parse_args()
    publish({**provenance(), **measure(options)}, options)


if __name__ == "__main__":
    main()
