"""Does the cache teach? Distillation from the cache against plain fine-tuning: same student, same rows, same steps.

    python tests/bench/kd_against_ce.py WORK_FOLDER [--out results/kd_against_ce.json] [--json]

Both arms try learning rates with the first seed until the best is better than both its neighbours; each arm's best one is
then run with two further seeds. What is
compared is the held-out loss and the top-1 agreement with the teacher after the last step, against the spread over seeds.
Every run is `teachercache train` in a process of its own. Stop it at any time: run again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from provenance import provenance

from teachercache.models.loading import find_model
from teachercache.quickstart import write_recipe

LEARNING_RATES = (2e-4, 5e-4, 1.2e-3, 3e-3, 6e-3)
FIRST_TRIED = (5e-4, 1.2e-3, 3e-3)
SEEDS = (0, 1, 2)
ARMS = {"kd": ["objective.alpha=0.9", "objective.temperature=1"], "ce": ["objective.alpha=0"]}
LAYERS = "keep:6"
TARGETS = "targets.logits={kind: top-k, k: 64, temperatures: [1, 2, 4, 8]}"
COMMON = ["train.trackers=[]", "train.keep_checkpoints=1", "train.log_every=10"]


def teachercache(*arguments: str) -> dict:
    command = [sys.executable, "-m", "teachercache", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def prepare(work: Path, epochs: float) -> Path:
    recipe, parsed = write_recipe(work, [TARGETS, f"train.epochs={epochs}"])
    teachercache("precompute", str(recipe))
    if not (Path(parsed.student.model) / "config.json").is_file():
        teachercache("init-student", parsed.teacher.model, "--layers", LAYERS, "--out", parsed.student.model)
    return recipe


def run(work: Path, recipe: Path, arm: str, rate: float, seed: int, *, epochs: float) -> dict:
    """One training run; its last evaluation. Finished runs are read back, and their checkpoints removed."""
    name = f"{arm}-lr{rate:g}-seed{seed}"
    kept = work / f"results-{LAYERS}-{epochs:g}-epochs" / f"{name}.json"
    if not kept.is_file():
        output = work / "runs" / name
        settings = [*ARMS[arm], *COMMON, f"train.learning_rate={rate}", f"train.seed={seed}", f"train.output={output}"]
        teachercache("train", str(recipe), *(part for setting in settings for part in ("-s", setting)))
        records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
        last = [record for record in records if "eval_loss" in record][-1]
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps({"arm": arm, "learning_rate": rate, "seed": seed, **provenance(), **last}))
        shutil.rmtree(output)
    result = json.loads(kept.read_text())
    print(f"{name}: loss {result['eval_loss']:.4f}, agreement {result['eval_top1_agreement']:.4f}", file=sys.stderr)
    return result


def bracket(run_at: Callable[[float], dict]) -> list[dict]:
    """Runs at the first three rates, and at further ones while the best lies at the edge of what was tried."""
    results = {rate: run_at(rate) for rate in FIRST_TRIED}
    while True:
        best = LEARNING_RATES.index(min(results, key=lambda rate: results[rate]["eval_loss"]))
        wanted = [rate for rate in LEARNING_RATES[max(0, best - 1) : best + 2] if rate not in results]
        if not wanted:
            return list(results.values())
        results[wanted[0]] = run_at(wanted[0])


def measure(work: Path, epochs: float) -> dict:
    recipe = prepare(work, epochs)
    runs, best = [], {}
    for arm in ARMS:
        first = bracket(lambda rate, arm=arm: run(work, recipe, arm, rate, SEEDS[0], epochs=epochs))
        best[arm] = min(first, key=lambda result: result["eval_loss"])["learning_rate"]
        runs += first
    for arm in ARMS:
        runs += [run(work, recipe, arm, best[arm], seed, epochs=epochs) for seed in SEEDS[1:]]
    chosen = {arm: [r for r in runs if r["arm"] == arm and r["learning_rate"] == best[arm]] for arm in ARMS}
    cache = teachercache("inspect", str(work / "cache"))
    return {
        **provenance(),
        "teacher": find_model(cache["teacher"]["model"]).portable_id,
        "student": f"{LAYERS} of the teacher's layers",
        "train_positions": cache["positions"]["train"],
        "held_out_positions": cache["positions"]["held-out"],
        "epochs": epochs,
        "best_learning_rate": best,
        "arms": {arm: summarise(results) for arm, results in chosen.items()},
        "margin": margin(chosen),
        "runs": runs,
    }


def summarise(results: list[dict]) -> dict:
    return {
        name: {"mean": statistics.mean(values), "spread": max(values) - min(values), "values": values}
        for name, values in (
            (key, [result[f"eval_{key}"] for result in results]) for key in ("loss", "top1_agreement", "accuracy", "kl")
        )
    }


def margin(chosen: dict[str, list[dict]]) -> dict:
    """The lead of KD, and the larger spread over seeds; `beats` wants more than that spread."""
    arms = {arm: summarise(results) for arm, results in chosen.items()}
    margins = {}
    for name, sign in (("loss", -1), ("top1_agreement", 1)):
        gain = sign * (arms["kd"][name]["mean"] - arms["ce"][name]["mean"])
        spread = max(arms[arm][name]["spread"] for arm in arms)
        margins[name] = {"gain": gain, "spread": spread, "beats": gain > spread}
    return margins


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = measure(options.work, options.epochs)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.json:
        print(json.dumps(result))
    else:
        for arm, figures in result["arms"].items():
            print(arm, {name: round(values["mean"], 4) for name, values in figures.items()})
        print("margin", result["margin"])


if __name__ == "__main__":
    main()
