"""The cost of boundary mass in a capture: its reduction beside the whole capture of the same rows, with and without it.

    python tests/bench/boundary_cost.py RECIPE [--positions 1000] [--repeats 5] [-s KEY=VALUE …] [--out FILE] [--json]

RECIPE's teacher captures rows of its corpus in this process; then blocks of logits as large as the capture's are reduced to
columns, with and without boundary mass in turn. The share is what that differs by, of what the capture without it takes.
Processor time, so that other work on the machine counts less (set OMP_NUM_THREADS=1: threads that wait do count). Medians over
the repeats.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from provenance import add_output_options, provenance, publish

from teachercache.config import load_recipe
from teachercache.precompute.capture.plan import Plan, make_plan
from teachercache.precompute.capture.unit_tokens import tokenise_unit
from teachercache.precompute.capture.units import calibrate
from teachercache.targets import StoredTargets
from teachercache.teacher import Teacher
from teachercache.teacher.forward import REDUCED_BYTES
from teachercache.tokens.rows import TokenRow


def rows_of(plan: Plan, recipe, positions: int) -> list[TokenRow]:
    rows: list[TokenRow] = []
    for unit in range(plan.units):
        rows += tokenise_unit(plan, unit, sequence=recipe.sequence, store_text=False)[0].rows
        if sum(row.positions for row in rows) >= positions:
            break
    while sum(row.positions for row in rows[:-1]) >= positions:
        rows.pop()
    return rows


def seconds_of(run) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--positions", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("-s", "--set", action="append", default=[], help="overrides of the recipe, as for the commands")
    add_output_options(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(options.recipe, [*options.set, f"cache={folder}/cache"])
        plan = make_plan(recipe)
        per_batch, pad_id = recipe.precompute.positions_per_batch, plan.identity["tokenizer"]["pad_id"]
        teacher = Teacher.load(recipe.teacher, targets=plan.targets, layout=recipe.sequence.layout, pad_id=pad_id)
        if plan.calibration() is None:
            calibrate(teacher, plan, sequence=recipe.sequence, positions_per_batch=per_batch)
        rows = rows_of(plan, recipe, options.positions)
    both, positions = teacher.targets, sum(row.positions for row in rows)
    plain = dataclasses.replace(both, boundary=None)
    size, V = REDUCED_BYTES["cpu"] // (4 * both.logits.vocabulary_size), both.logits.vocabulary_size
    generator = torch.Generator().manual_seed(0)
    blocks = (torch.randn(32 * size, V, generator=generator) * 3).split(size)
    hidden_nD = torch.randn(size, teacher.backend.model.config.hidden_size, generator=generator)
    labels_n, seeds_n = torch.zeros(size, dtype=torch.int64), np.zeros(size, dtype=np.uint64)

    def reduced(targets: StoredTargets) -> float:
        """Seconds a position."""
        seconds = 0.0
        for block_nV in blocks:
            logits_nV = block_nV.clone()
            seconds += seconds_of(lambda z=logits_nV: targets.capture(torch, z, labels_n, hidden_nD, seeds_n))
        return seconds / (len(blocks) * size)

    teacher.targets = plain
    timed: dict[str, list[float]] = {"capture": [], "with": [], "without": []}
    for repeat in range(options.repeats):
        timed["capture"].append(seconds_of(lambda: teacher.capture(rows, positions_per_batch=per_batch)) / positions)
        sides = [("with", both), ("without", plain)]
        for name, targets in sides[:: 1 - 2 * (repeat % 2)]:
            timed[name].append(reduced(targets))
    medians = {name: statistics.median(values) for name, values in timed.items()}
    more = [theirs - ours for theirs, ours in zip(timed["with"], timed["without"], strict=True)]
    result = {
        **provenance(), "kind": both.logits.kind, "vocabulary": V, "positions": positions, "threads": torch.get_num_threads(),
        "capture_microseconds": 1e6 * medians["capture"], "reduced_without_microseconds": 1e6 * medians["without"],
        "boundary_microseconds": 1e6 * statistics.median(more),
        "share_of_capture": statistics.median(more) / medians["capture"],
    }  # fmt: skip
    publish(result, options)


if __name__ == "__main__":
    main()
