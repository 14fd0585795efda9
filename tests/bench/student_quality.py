"""Does a student learn as much from the cache as from the live teacher with its full vocabulary?

    python tests/bench/student_quality.py WORK_FOLDER [--epochs 2] [--out results/student_quality.json] [--json]

Same student, same rows in the same order, same steps, same learning rate, pure forward KL; what differs is the teacher:

    live        all logits of the teacher
    sketch      a cache of the default kind, preset compact
    top-50      a cache of the 50 largest logits, renormalised

at T = 1 throughout, and with T = 5, then 3, then 1 for a third of the steps each. The arms of a seed learn side by side.
What counts is the held-out loss (CE, nats) after the last step.
Stop it at any time: run again, it goes on with the seed where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kd_against_ce import teachercache
from provenance import provenance
from student_loss import student_loss
from torch import Tensor

from teachercache.cache import Cache
from teachercache.models.loading import load_causal_lm
from teachercache.objective import NO_TARGET
from teachercache.objective.logits.operands import Weights
from teachercache.quickstart import write_recipe
from teachercache.stream.cache_rows import OwnRows
from teachercache.stream.collate import Collator
from teachercache.stream.order.batch_plan import BatchPlan, spread
from teachercache.stream.sources import train_order
from teachercache.targets import Softened, TailPolicy
from teachercache.training.supervision.held_out import HeldOutMeasure
from teachercache.training.trainer.held_out_pass import add_batch

SEEDS = (0, 1, 2)
SCHEDULES = {"1": (1.0,), "5-3-1": (5.0, 3.0, 1.0)}  # equal shares of the steps
ARMS = ("live", "sketch", "top-50")
LEARNING_RATE = 1e-3
WARM_UP = 0.1  # of the steps; then a linear decay to zero
LAYERS = "keep:6"
INPUTS = ("input_ids", "attention_mask", "position_ids")
TARGETS = {"sketch": "{preset: compact}", "top-50": "{kind: top-k, k: 50, temperatures: [1, 3, 5]}"}
POLICIES: dict[str, TailPolicy] = {"sketch": "sketch", "top-50": "renormalise"}


@dataclass(frozen=True, eq=False)
class LiveTail:
    """All of a teacher's logits at one temperature."""

    logits_NV: Tensor

    def logits(self, part: slice, xp: Any) -> Tensor:
        """A copy, [C, V]."""
        return self.logits_NV[part].clone()

    def at(self, part: slice) -> LiveTail:
        """Targets of some of the positions."""
        return LiveTail(self.logits_NV[part])


def live(logits_NV: Tensor, temperature: float) -> Softened:
    """The teacher itself: a head of one token, and a tail that is exact."""
    log_prob_NV = torch.log_softmax(logits_NV / temperature, dim=-1)
    head_N1, ids_N1 = log_prob_NV.max(dim=-1, keepdim=True)
    rest_N = log_prob_NV.scatter(1, ids_N1, -torch.inf).logsumexp(-1)
    return Softened(ids_N1, head_N1, rest_N, LiveTail(log_prob_NV))


class Bench:
    """The caches of one corpus, its teacher, and the student that every run starts from."""

    def __init__(self, work: Path) -> None:
        self.caches: dict[str, Cache] = {}
        for arm, targets in TARGETS.items():
            recipe_file, recipe = write_recipe(work / arm, [f"targets.logits={targets}"])
            teachercache("precompute", str(recipe_file))
            self.caches[arm] = Cache.open(recipe.cache)
        assert recipe.teacher is not None
        self.student_folder = work / "student-init"
        if not (self.student_folder / "config.json").is_file():
            teachercache("init-student", recipe.teacher.model, "--layers", LAYERS, "--out", str(self.student_folder))
        self.teacher: Any = load_causal_lm(recipe.teacher.model, dtype="float32").eval()
        self.hidden: dict[str, Tensor] = {}  # what enters the teacher's output layer, by row
        self.columns = {arm: cache.kind.objective_columns(POLICIES[arm]) for arm, cache in self.caches.items()}

    def run(self, schedule: str, seed: int, *, epochs: float) -> dict[str, dict[str, float]]:
        """Train all arms; their held-out metrics."""
        torch.manual_seed(seed)
        cache = self.caches["sketch"]
        plan = BatchPlan(train_order(cache, seed=seed), 4, 4, 1)
        steps = plan.steps(epochs)
        students: dict[str, Any] = {arm: load_causal_lm(str(self.student_folder), dtype="float32") for arm in ARMS}
        optimizers = {arm: torch.optim.AdamW(student.parameters()) for arm, student in students.items()}
        where = self._rows_by_id()
        for step in range(steps):
            temperature = SCHEDULES[schedule][step * len(SCHEDULES[schedule]) // steps]
            rows = plan.step_rows(step)
            row_ids = [cache.read_row("train", int(index), columns=()).row.row_id for index in rows]
            for arm, teacher, batch in self._teachers(row_ids, where, temperature):
                for group in optimizers[arm].param_groups:
                    group["lr"] = LEARNING_RATE * min((step + 1) / (WARM_UP * steps), 1 - step / steps)
                loss = self._loss(students[arm].train(), batch, teacher, temperature)
                optimizers[arm].zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(students[arm].parameters(), 1.0)
                optimizers[arm].step()
            print(f"\r{schedule} seed {seed}: step {step + 1} of {steps}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        return {arm: self._held_out(student) for arm, student in students.items()}

    def _rows_by_id(self) -> dict[str, dict[str, int]]:
        """Both caches hold the same rows, not necessarily in the same order."""
        return {
            arm: {
                cache.read_row("train", index, columns=()).row.row_id: index for index in range(cache.rows_of("train"))
            }
            for arm, cache in self.caches.items()
        }

    def _teachers(self, row_ids: list[str], where: dict[str, dict[str, int]], temperature: float) -> Any:
        """(arm, its teacher at T, its batch) for every arm."""
        for arm, cache in self.caches.items():
            stored = [cache.read_row("train", where[arm][row_id], columns=self.columns[arm]) for row_id in row_ids]
            batch = Collator.of(OwnRows(cache, self.columns[arm]))(stored)
            targets = batch.pop("targets")
            if arm == "sketch":
                yield "live", live(self._logits(row_ids, batch), temperature), batch
            yield arm, cache.kind.softened(targets, temperature, tail=POLICIES[arm], xp=torch), batch

    @torch.no_grad()
    def _logits(self, row_ids: list[str], batch: dict[str, Tensor]) -> Tensor:
        """All of the teacher's logits at the positions of a batch, [N, V].

        Its weights stand still, so a row's final hidden states are the same at every step: they are kept, and projected anew.
        """
        for index, row_id in enumerate(row_ids):
            if row_id not in self.hidden:
                is_position_S = batch["shift_labels"][index] != NO_TARGET
                inputs = {name: batch[name][index : index + 1] for name in INPUTS if name in batch}
                self.hidden[row_id] = self.teacher.model(**inputs, use_cache=False).last_hidden_state[0][is_position_S]
        hidden_ND = torch.cat([self.hidden[row_id] for row_id in row_ids])
        return self.teacher.lm_head(hidden_ND)[:, : self.caches["sketch"].manifest.vocabulary_size]

    def _loss(self, student: Any, batch: dict[str, Tensor], teacher: Softened, temperature: float) -> Tensor:
        return student_loss(
            student,
            {name: values for name, values in batch.items() if name != "shift_labels"},
            batch["shift_labels"],
            teacher=teacher,
            weights=Weights(1.0, temperature),
            vocabulary_size=self.caches["sketch"].manifest.vocabulary_size,
        )

    def _held_out(self, student: Any) -> dict[str, float]:
        cache = self.caches["sketch"]
        measure = HeldOutMeasure(cache.kind, tail="auto", device=torch.device("cpu"))
        collate = Collator.of(OwnRows(cache, measure.columns))
        batches = spread(cache.rows_of("held-out"), micro_batch=8, rank=0, world_size=1)
        student.eval()
        for batch in batches:
            rows = [cache.read_row("held-out", i, columns=measure.columns) for i in batch]
            add_batch(measure, student, collate(rows))
        return measure.metrics(measure.sums, prefix="held_out")


def measure(work: Path, epochs: float) -> dict[str, Any]:
    """All schedules and seeds, those that are done read back."""
    bench: Bench | None = None
    runs: dict[str, list[dict[str, Any]]] = {}
    for schedule in SCHEDULES:
        for seed in SEEDS:
            kept = work / f"results-{epochs:g}-epochs" / f"T{schedule}-seed{seed}.json"
            if not kept.is_file():
                bench = bench or Bench(work)
                kept.parent.mkdir(exist_ok=True)
                kept.write_text(json.dumps({**provenance(), **bench.run(schedule, seed, epochs=epochs)}))
            runs.setdefault(schedule, []).append(json.loads(kept.read_text()))
    cache = teachercache("inspect", str(work / "sketch" / "cache"))
    return {
        **provenance(),
        "train_positions": cache["positions"]["train"],
        "held_out_positions": cache["positions"]["held-out"],
        "epochs": epochs,
        "schedules": {schedule: summarise(results) for schedule, results in runs.items()},
        "runs": runs,
    }


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """By arm: held-out loss, its mean over seeds, and how much worse than the live teacher, seed by seed and on average."""
    losses = {arm: [result[arm]["held_out_loss"] for result in results] for arm in ARMS}
    mean = {arm: statistics.mean(values) for arm, values in losses.items()}
    return {
        arm: {
            "loss": mean[arm],
            "losses": values,
            "worse_than_live": mean[arm] / mean["live"] - 1,
            "worse_by_seed": (np.array(values) / np.array(losses["live"]) - 1).tolist(),
        }
        for arm, values in losses.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = measure(options.work, options.epochs)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.json:
        print(json.dumps(result))
        return
    for schedule, arms in result["schedules"].items():
        for arm, figures in arms.items():
            print(
                f"T = {schedule:6} {arm:8} loss {figures['loss']:.4f}, {figures['worse_than_live']:+.2%} against live"
            )


if __name__ == "__main__":
    main()
