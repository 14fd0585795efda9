"""Time and memory that it takes to find each row of one cache in another.

    python tests/bench/join_rows.py [--rows 1000000] [--length 64] [--json]

Two caches of kind top-k whose shards, of 1024 rows each, are listed again and again until there are so many rows: reading ids
takes as long as if all of them were different. Looking up is measured by itself, on as many random keys of which half are
found. In a process of its own, best of three.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from open_cache import multiply
from provenance import add_output_options, provenance, publish
from synthetic_cache import ROWS_PER_SHARD, top_k_cache


def measure(folder: Path, rows: int) -> dict[str, float]:
    from teachercache.cache import Cache
    from teachercache.cache.row_keys import row_keys
    from teachercache.stream.ensemble_rows import looked_up

    cache = Cache.open(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    keys = row_keys(cache)["train"]
    read = time.perf_counter() - start
    generator = np.random.default_rng(0)
    other = generator.permutation(np.concatenate([keys[: rows // 2], generator.integers(0, 2**63, rows // 2)]))
    start = time.perf_counter()
    order = np.argsort(other)
    looked_up(generator.permutation(keys), other[order], order)
    joined = time.perf_counter() - start
    added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"rows": len(keys), "read_seconds_a_cache": read, "look_up_seconds": joined, "megabytes": added}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    add_output_options(parser)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.rows)))
        return
    with tempfile.TemporaryDirectory() as name:
        made, many = Path(name) / "made", Path(name) / "many"
        many.mkdir()
        top_k_cache(made, count=8 * ROWS_PER_SHARD, length=options.length)
        multiply(made, many, options.rows // ROWS_PER_SHARD)
        command = [sys.executable, __file__, "--measure", str(many), "--rows", str(options.rows)]
        runs = [json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout) for _ in range(3)]
    best = {key: min(run[key] for run in runs) for key in runs[0]}
    publish({**provenance(), "length": options.length, **best}, options)


if __name__ == "__main__":
    main()
