"""Does a student that matches layers resemble its teacher more, and at what cost in loss? Against logits alone, same steps.

    python tests/bench/layer_quality.py WORK_FOLDER [--seeds 0] [--steps 54] [--learning-rate 1.2e-3] [--out FILE] [--json]

The quickstart's pair (8 of the teacher's 30 blocks, 54 steps of 4 rows); the arms differ in `objective.layers` alone.

    features   of each matched pair of hidden states: the cosine of teacher and student, after a ridge map that is fitted to the
               student's states on rows of the training split, for each arm and pair anew; on held-out rows, first tokens left
               out; raw, and both less the teacher's mean
    attention  of each matched pair of blocks: the mean cosine of a query's row over keys and heads, without the first key,
               on held-out rows
    loss       cross-entropy of held-out rows, nats a position

`gain` is the rise of the similarity; where the base is above 0.75, the fall of 1 - cosine. Stop it at any time: run again, it
goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kd_against_ce import teachercache
from provenance import add_output_options, provenance, publish
from torch import Tensor
from torch.nn.functional import cosine_similarity

from teachercache.activations import recorded
from teachercache.models import load_causal_lm, model_inputs
from teachercache.quickstart import student_arguments, write_recipe
from teachercache.shards import Cache
from teachercache.shards.reader import Split
from teachercache.targets.attention import log_attention, sees

# Student's layers and the teacher's whose copies they began as: `keep:8` keeps blocks 1, 5, 9, 13, 18, 22, 26 and 30.
HIDDEN = {3: 12, 5: 21, 7: 29, 8: 30}
ATTENTION = {4: 13, 6: 22, 8: 30}
TARGETS = [
    f"targets.hidden={json.dumps({'layers': sorted(HIDDEN.values())})}",
    f"targets.attention={json.dumps({'layers': sorted(ATTENTION.values())})}",
]
TERMS = [
    {"match": "hidden-cosine", "weight": 0.5, "pairs": HIDDEN},
    {"match": "attention-kl", "weight": 0.5, "pairs": ATTENTION},
]
ARMS: dict[str, list[Any]] = {"logits": [], "layers": TERMS}
FITTED_ROWS = 48
RIDGE = 1e-3  # of the states' mean square


def train(work: Path, arm: str, seed: int, options: argparse.Namespace) -> tuple[Cache, Path]:
    recipe_file, recipe = write_recipe(work, TARGETS)
    teachercache("precompute", str(recipe_file))
    if arguments := student_arguments(work, recipe):
        teachercache("init-student", *arguments)
    output = work / f"{arm}-{seed}"
    settings = {
        "train.output": output, "train.seed": seed, "train.max_steps": options.steps, "train.evaluate_every": options.steps,
        "train.learning_rate": options.learning_rate, "objective.layers": json.dumps(ARMS[arm]),
    }  # fmt: skip
    arguments = [each for key, value in settings.items() for each in ("-s", f"{key}={value}")]
    teachercache("train", str(recipe_file), *arguments)
    return Cache.open(recipe.cache), output


class Held:
    """What a model's matched layers hold at some rows; all tokens of a row but the first."""

    def __init__(
        self, model: Any, cache: Cache, *, hidden: list[int], attention: list[int], split: Split, count: int
    ) -> None:
        self.hidden: dict[int, Tensor] = {}
        self.maps: dict[int, list[Tensor]] = defaultdict(list)
        states: dict[int, list[Tensor]] = defaultdict(list)
        for index in range(min(count, cache.rows_of(split))):
            row = cache.read_row(split, index, columns=()).row
            inputs = model_inputs([row], pad_id=0, layout="documents")
            with torch.inference_mode(), recorded(model, hidden=hidden, attention=attention) as activations:
                model.base_model(**{name: torch.from_numpy(values) for name, values in inputs.items()}, use_cache=False)
            for layer in hidden:
                states[layer].append(activations.hidden[layer][0, 1:])
            seen = sees(torch, torch.zeros(1, row.length, dtype=torch.int64), window=None)
            for layer in attention:
                heads = activations.attention[layer]
                maps = log_attention(heads.queries_BHSE, heads.keys_BKSE, seen, scaling=heads.scaling).exp()
                self.maps[layer].append(maps[0, :, 2:, 1:])  # the second query sees one key beside the first
        self.hidden = {layer: torch.cat(parts).double() for layer, parts in states.items()}


def ridge(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """[Ds + 1, Dt], the constant last."""
    student_ND = torch.cat([student_ND, torch.ones(len(student_ND), 1, dtype=student_ND.dtype)], dim=1)
    gram = student_ND.T @ student_ND
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram, student_ND.T @ teacher_ND)


def resemblance(cache: Cache, run: Path, teachers: dict[str, Held]) -> dict[str, Any]:
    model = load_causal_lm(str(run / "student"), dtype="float32").eval()
    ours = {"hidden": list(HIDDEN), "attention": list(ATTENTION)}
    fitted = Held(model, cache, **ours, split="train", count=FITTED_ROWS)
    held = Held(model, cache, **ours, split="held-out", count=10**6)
    features: dict[str, dict[str, float]] = {"raw": {}, "centred": {}}
    for student, teacher in HIDDEN.items():
        map_DD = ridge(fitted.hidden[student], teachers["train"].hidden[teacher])
        found = held.hidden[student] @ map_DD[:-1] + map_DD[-1]
        exact, mean = teachers["held-out"].hidden[teacher], teachers["train"].hidden[teacher].mean(0)
        features["raw"][f"{student}:{teacher}"] = float(cosine_similarity(found, exact, dim=-1).mean())
        features["centred"][f"{student}:{teacher}"] = float(
            cosine_similarity(found - mean, exact - mean, dim=-1).mean()
        )
    attention = {}
    for student, teacher in ATTENTION.items():
        pairs = zip(held.maps[student], teachers["held-out"].maps[teacher], strict=True)
        cosines = [cosine_similarity(found, exact, dim=-1).flatten() for found, exact in pairs]
        attention[f"{student}:{teacher}"] = float(torch.cat(cosines).mean())
    last = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    loss = [record["eval_loss"] for record in last if "eval_loss" in record][-1]
    return {"features": features, "attention": attention, "loss": loss}


def gain(base: float, found: float) -> float:
    return (found - base) / (1 - base) if base > 0.75 else found / base - 1


def measure(options: argparse.Namespace) -> dict[str, Any]:
    runs = {arm: [train(options.work, arm, seed, options) for seed in options.seeds] for arm in ARMS}
    cache = runs["logits"][0][0]
    teacher = load_causal_lm(cache.manifest.teacher["model"], dtype="float32").eval()
    theirs = {"hidden": list(HIDDEN.values()), "attention": list(ATTENTION.values())}
    splits: dict[Split, int] = {"train": FITTED_ROWS, "held-out": 10**6}
    teachers: Any = {split: Held(teacher, cache, **theirs, split=split, count=count) for split, count in splits.items()}
    arms = {arm: [resemblance(cache, run, teachers) for _, run in made] for arm, made in runs.items()}
    means = {
        arm: {
            **{
                name: statistics.mean(np.mean(list(run["features"][name].values())) for run in found)
                for name in ("raw", "centred")
            },
            "attention": statistics.mean(np.mean(list(run["attention"].values())) for run in found),
            "loss": statistics.mean(run["loss"] for run in found),
        }
        for arm, found in arms.items()
    }
    base, matched = means["logits"], means["layers"]
    return {
        "seeds": options.seeds,
        "steps": options.steps,
        "learning_rate": options.learning_rate,
        "terms": TERMS,
        "means": means,
        "gain": {name: gain(base[name], matched[name]) for name in ("raw", "centred")},
        "loss_over_base": matched["loss"] / base["loss"] - 1,
        "arms": arms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=54)
    parser.add_argument("--learning-rate", type=float, default=1.2e-3)
    add_output_options(parser)
    options = parser.parse_args()
    publish({**provenance(), **measure(options)}, options)


if __name__ == "__main__":
    main()
