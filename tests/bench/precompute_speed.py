"""The share of the bare teacher's speed that the whole precompute job keeps.

    python tests/bench/precompute_speed.py WORK_FOLDER [--repeats 3] [-s KEY=VALUE …] [--out FILE] [--json]

Side by side in one process tree, in turn: the whole job on Ray, and the bare forward pass (output projection included,
nothing captured) over the very batches of that job, with as many threads. Positions per second from the first position to
the last; start-up is reported apart. The bare pass runs twice: as it is, and with the allocator's settings that the job gives
its actors. Medians over the repeats; the ratio is taken within each repeat.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from provenance import add_output_options, provenance, publish

from teachercache.precompute.capture.stages import KEEP_FREED_MEMORY


def whole_job(work: Path, overrides: list[str]) -> dict:
    from teachercache.quickstart import write_recipe

    shutil.rmtree(work / "cache", ignore_errors=True)
    recipe, _ = write_recipe(work, overrides)
    command = [sys.executable, "-m", "teachercache", "precompute", str(recipe), "--json"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def bare_forward(work: Path, **environment: str) -> dict:
    """In a process of its own, as the actor's is."""
    command = [sys.executable, __file__, str(work), "--bare"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **environment})
    return json.loads(done.stdout)


def run_bare(work: Path) -> dict:
    import torch

    from teachercache.cache import SPLITS, Cache
    from teachercache.config import load_recipe
    from teachercache.models.loading import load_causal_lm, model_inputs
    from teachercache.teacher import length_sorted_batches

    recipe = load_recipe(work / "recipe.yaml")
    cache = Cache.open(recipe.cache)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = load_causal_lm(recipe.teacher.model, dtype=recipe.teacher.dtype)
    units: dict[str, list] = {}
    for split in SPLITS:
        start = 0
        for shard in cache.manifest.shards:
            count = shard.held_out_rows if split == "held-out" else shard.rows - shard.held_out_rows
            rows = [cache.read_row(split, index, columns=()).row for index in range(start, start + count)]
            units.setdefault(shard.file, []).extend(rows)
            start += count
    batches = [
        [rows[index] for index in batch]
        for rows in units.values()
        for batch in length_sorted_batches(rows, positions_per_batch=recipe.precompute.positions_per_batch)
    ]
    inputs = [
        {name: torch.from_numpy(v) for name, v in model_inputs(batch, pad_id=0, layout=recipe.sequence.layout).items()}
        for batch in batches
    ]
    start = time.perf_counter()
    with torch.inference_mode():
        for arguments in inputs:
            model(**arguments, use_cache=False)
    seconds = time.perf_counter() - start
    positions = sum(row.positions for batch in batches for row in batch)
    return {"positions": positions, "seconds": seconds, "positions_per_second": positions / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=int, default=20, help="rows of the corpus")
    parser.add_argument("-s", "--set", action="append", default=[], help="overrides of the recipe, as for the commands")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    add_output_options(parser)
    options = parser.parse_args()
    if options.bare:
        print(json.dumps(run_bare(options.work)))
        return
    overrides = [f"corpus.limit={options.limit}", *options.set]
    runs = []
    for _ in range(options.repeats):
        job = whole_job(options.work, overrides)
        runs.append((job, bare_forward(options.work), bare_forward(options.work, **KEEP_FREED_MEMORY)))
    ratios = [job["positions_per_second"] / bare["positions_per_second"] for job, bare, _ in runs]
    tuned = [job["positions_per_second"] / bare["positions_per_second"] for job, _, bare in runs]
    result = {
        **provenance(),
        "overrides": overrides,
        "positions": runs[0][1]["positions"],
        "job_positions_per_second": statistics.median(job["positions_per_second"] for job, _, _ in runs),
        "bare_positions_per_second": statistics.median(bare["positions_per_second"] for _, bare, _ in runs),
        "start_up_seconds": statistics.median(job["start_up_seconds"] for job, _, _ in runs),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "ratio_to_bare_that_keeps_memory": statistics.median(tuned),
        "ratios_to_bare_that_keeps_memory": tuned,
    }
    publish(result, options)


if __name__ == "__main__":
    main()
