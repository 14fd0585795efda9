"""A cache of a subject's teacher, a student of the same architecture, and a run of the training job.

python tests/zoo/training.py PORT:RECIPE…      trains one after the other, as one of the processes that `start` starts
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

STEPS, ROWS, LENGTH = 3, 8, 32
WORDS = 60  # of a text: several windows


def cache_recipe(folder: Path, teacher: Path, *, layout: str = "documents") -> Any:
    """Recipe of a small cache: windows of `LENGTH` tokens of long texts, a fifth of them held out."""
    from builders import sentences, tiny_recipe

    return tiny_recipe(
        folder,
        teacher=teacher,
        texts=sentences(10, words=WORDS),
        corpus={"held_out": 0.3},
        sequence={"length": LENGTH, "layout": layout},
        targets={"logits": {"kind": "top-k", "k": 16, "dtype": "float32"}, "boundary_mass": False},
    )


def train_recipe(cache: Path, student: Path, output: Path) -> Any:
    """Recipe of a few steps under ZeRO 2: targets and cross-entropy at a temperature, on two micro-batches a step."""
    from teachercache.config import parse_recipe

    train = {
        "output": str(output), "global_batch": ROWS, "micro_batch": ROWS // 2, "max_steps": STEPS, "zero_stage": 2,
        "learning_rate": 0.003, "log_every": 1, "evaluate_every": STEPS, "loader_workers": 0, "trackers": [],
    }  # fmt: skip
    objective = {"alpha": 0.5, "temperature": 2.0}
    data = {"cache": str(cache), "student": {"model": str(student)}, "objective": objective, "train": train}
    return parse_recipe(data, origin="the zoo")


def held_out_loss(student: Path, cache: Path) -> float:
    """Cross-entropy of the held-out positions, as transformers alone computes it of a folder, a row at a time. `eager`: its
    default leaves out a part of some models."""
    from transformers import AutoModelForCausalLM

    from teachercache.cache import Cache

    model, opened = AutoModelForCausalLM.from_pretrained(student, attn_implementation="eager"), Cache.open(cache)
    model.eval()
    losses = []
    for index in range(opened.rows_of("held-out")):
        row = opened.read_row("held-out", index, columns=()).row
        with torch.no_grad():
            logits_SV = model(torch.from_numpy(row.input_ids_S).long()[None], use_cache=False).logits[0].float()
        log_prob_NV = logits_SV[torch.from_numpy(row.target_mask_S)].log_softmax(-1)
        losses.append(-log_prob_NV.gather(1, torch.from_numpy(row.labels_N()).long()[:, None])[:, 0])
    return float(torch.cat(losses).mean())


def start(recipes: list[Path], *, processes: int) -> list[subprocess.Popen[bytes]]:
    """That many processes, each of which trains these recipes one after the other, all together on each."""
    jobs = [f"{_free_port()}:{path}" for path in recipes]
    root = Path(__file__).parents[2]
    shared = {
        **os.environ,
        "PYTHONPATH": f"{root / 'pipeline'}{os.pathsep}{root / 'tests'}",
        "MASTER_ADDR": "127.0.0.1",
    }
    worlds = [
        {
            **shared,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
        }
        for rank in range(processes)
    ]
    command = [sys.executable, __file__, *jobs]
    return [subprocess.Popen(command, env=world, stderr=subprocess.DEVNULL) for world in worlds]


def _free_port() -> int:
    """Below those that a system hands out for connections: nobody else is likely to take it until the processes are there."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def main(jobs: list[str]) -> None:
    """`PORT:RECIPE`, a port for each: a group of processes that has ended leaves its port behind."""
    from teachercache.config import load_recipe
    from teachercache.errors import TeachercacheError
    from teachercache.training.job.train import run_training

    for job in jobs:
        os.environ["MASTER_PORT"], _, path = job.partition(":")
        try:
            run_training(load_recipe(Path(path)))
        except TeachercacheError as error:
            print(f"{path}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
