"""The cost of capturing top-k targets per position, by the size of a block of positions.

    python tests/bench/capture_cost.py [--vocabulary 49152] [--k 64] [--threads 2] [--json]

Microseconds per position for `TopK.capture` (top-k and four log-partitions), and for the selection alone beside
`torch.topk`, medians of five; compare with the 2,300 µs of a
forward pass of SmolLM2-135M on two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from teachercache.targets import TopK

GRID = (1.0, 2.0, 4.0, 8.0)
POSITIONS = 1024


def microseconds(kind: TopK, logits_NV: torch.Tensor, labels_N: torch.Tensor, block: int) -> float:
    seconds = []
    for _ in range(5):
        logits = logits_NV.clone()
        start = time.perf_counter()
        for first in range(0, POSITIONS, block):
            kind.capture(torch, logits[first : first + block], labels_N[first : first + block])
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) / POSITIONS * 1e6


def selection_microseconds(select: Callable[[torch.Tensor, int], Any], logits_NV: torch.Tensor, k: int) -> float:
    """In blocks of 8 positions, as the teacher captures on a CPU."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        for block_NV in logits_NV.split(8):
            select(block_NV, k)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) / POSITIONS * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("vocabulary", 49152), ("k", 64), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    kind = TopK(options.k, GRID, "float16", options.vocabulary)
    logits_NV = torch.randn(POSITIONS, options.vocabulary) * 3
    labels_N = torch.randint(0, options.vocabulary, (POSITIONS,))
    result = {
        block: round(microseconds(kind, logits_NV, labels_N, block), 1) for block in (4, 8, 16, 32, 128, POSITIONS)
    }
    print(json.dumps(result) if options.json else result)


if __name__ == "__main__":
    main()
