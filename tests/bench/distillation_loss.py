"""Time of the cached loss against plain cross-entropy, forward and backward, on one batch.

    python tests/bench/distillation_loss.py [--positions 1024] [--vocabulary 49152] [--k 64] [--threads 2]

Prints milliseconds (best of some rounds; the contestants take turns, so that a busy machine hits all of them) and the
ratio to `torch.nn.functional.cross_entropy`. For the share in a training step add the student's forward and backward.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from teachercache.config import ObjectiveConfig
from teachercache.objective import DistillationObjective
from teachercache.objective.logits.student_output import StudentOutput
from teachercache.targets import TopK

GRID = (1.0, 2.0, 4.0, 8.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("positions", 1024), ("vocabulary", 49152), ("k", 64), ("threads", 2), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name, milliseconds, ratio in measure(options):
        print(f"{name:28}{milliseconds:9.1f} ms   {ratio:.2f}")


def measure(options: argparse.Namespace) -> list[tuple[str, float, float]]:
    contestants = _contestants(options)
    best = dict.fromkeys(contestants, float("inf"))
    for _ in range(options.rounds):
        for name, step in contestants.items():
            start = time.perf_counter()
            step()
            best[name] = min(best[name], time.perf_counter() - start)
    return [(name, seconds * 1e3, seconds / best["cross_entropy"]) for name, seconds in best.items()]


def _contestants(options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    shape = options.positions, options.vocabulary
    student_NV = (torch.randn(shape) * 3).to(getattr(torch, options.dtype))
    labels_N = torch.randint(0, options.vocabulary, (options.positions,))
    kind = TopK(options.k, GRID, "float16", options.vocabulary)
    targets = {n: torch.from_numpy(v) for n, v in kind.capture(torch, torch.randn(shape) * 3, labels_N).items()}

    def plain() -> None:
        leaf = student_NV.detach().requires_grad_()
        (F.cross_entropy(leaf, labels_N, reduction="sum") / options.positions).backward()

    def cached(alpha: float, temperature: float, tail: str) -> Callable[[], None]:
        config = ObjectiveConfig.model_validate({"alpha": alpha, "temperature": temperature, "tail": tail})
        objective = DistillationObjective(config, kind=kind)

        def step() -> None:
            leaf = student_NV[None].detach().requires_grad_()
            (objective(StudentOutput.of_logits(leaf), labels_N[None], targets).total / options.positions).backward()

        return step

    cases = [(0.0, 1.0, "ghost"), *((0.9, t, "ghost") for t in GRID), (1.0, 2.0, "ghost"), (0.9, 2.0, "renormalise")]
    return {"cross_entropy": plain} | {f"alpha={a:g} T={t:g} {tail}": cached(a, t, tail) for a, t, tail in cases}


if __name__ == "__main__":
    main()
