"""The cost of a training step from the cache over plain fine-tuning: same student, same rows, in turn.

    python tests/bench/train_step.py CACHE STUDENT [--steps 12] [--batch 8] [--json]

Contestants: `plain` is transformers' own cross-entropy (`model(input_ids, labels=...)`), `ce` is our loss without the
teacher, `kd-t1` and `kd-t2` distil at T = 1 and T = 2. Every round takes one step (forward, backward, AdamW) of each on
the same rows, decoding included; medians over the rounds, ratios within each round.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
from provenance import provenance
from turns import compare

from teachercache.cache import Cache
from teachercache.config import ObjectiveConfig
from teachercache.models.loading import load_causal_lm
from teachercache.objective import NO_TARGET, DistillationObjective
from teachercache.objective.logits.student_output import StudentOutput
from teachercache.stream.cache_rows import OwnRows
from teachercache.stream.collate import Collator
from teachercache.stream.order.batch_plan import BatchPlan
from teachercache.stream.sources import train_order
from teachercache.training.trainer.output_layer import loss_for_logits

OBJECTIVES = {
    "ce": ObjectiveConfig(alpha=0.0),
    "kd-t1": ObjectiveConfig(alpha=0.9, temperature=1.0),
    "kd-t2": ObjectiveConfig(alpha=0.9, temperature=2.0),
}


def contestants(cache: Cache, student: str) -> dict[str, Callable[[list[int]], None]]:
    model = load_causal_lm(student).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step(loss: torch.Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def plain(rows: list[int]) -> None:
        batch = Collator.of(OwnRows(cache, ()))([cache.read_row("train", row, columns=()) for row in rows])
        labels = batch["input_ids"].clone()
        step(model(input_ids=batch["input_ids"], labels=labels, use_cache=False).loss)

    def cached(config: ObjectiveConfig) -> Callable[[list[int]], None]:
        objective = DistillationObjective(config, kind=cache.kind)
        columns = objective.columns
        collate = Collator.of(OwnRows(cache, columns))

        def run(rows: list[int]) -> None:
            batch = collate([cache.read_row("train", row, columns=columns) for row in rows])
            labels_BS, targets = batch["shift_labels"], batch["targets"]

            def loss(output: StudentOutput) -> torch.Tensor:
                return objective(output, labels_BS, targets).total

            with loss_for_logits(model, loss):  # as `DistillationTrainer` does
                total = model(input_ids=batch["input_ids"], use_cache=False).logits
            step(total.sum() / int((labels_BS != NO_TARGET).sum()))

        return run

    return {"plain": plain} | {name: cached(config) for name, config in OBJECTIVES.items()}


def measure(cache: Cache, student: str, *, steps: int, batch: int) -> dict:
    runs = contestants(cache, student)
    plan = BatchPlan(train_order(cache, seed=0), global_batch=batch, micro_batch=batch, world_size=1)
    taking = {name: lambda number, run=run: run(plan.step_rows(number).tolist()) for name, run in runs.items()}
    return {
        **provenance(),
        "student": student,
        "rows": batch,
        "threads": torch.get_num_threads(),
        **compare("steps", taking, steps, base="plain"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache")
    parser.add_argument("student")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = measure(Cache.open(options.cache), options.student, steps=options.steps, batch=options.batch)
    print(json.dumps(result) if options.json else result)


if __name__ == "__main__":
    main()
