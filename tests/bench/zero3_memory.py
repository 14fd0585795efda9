"""Memory that a student under ZeRO 3 takes of each process before and in its first step, loaded whole and loaded in parts.

    python tests/bench/zero3_memory.py WORK_FOLDER [--processes 4] [--width 1024] [--layers 8] [--json] [--out FILE]

A Llama with random weights in float32, distilled from a tiny cache, by so many processes of gloo on this machine, each of
which stands for a GPU's. `whole` loads as before: the student first, then DeepSpeed's configuration, which cuts it up. `parts`
loads as the training job does. Megabytes of the process that takes most, above what it held before there was a student:

    loaded      peak of loading: anonymous memory, which is what a process cannot give back
    mapped      the same with pages of the checkpoint's file, which all processes share and the system may drop
    started     peak until the first step begins: with DeepSpeed's parts, master weights and moments
    step        peak up to the end of the first step

and the same `of_student`, over its own size. On a CPU a checkpoint is mapped: a whole student costs nothing until it is cut up.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from provenance import add_output_options, provenance, publish

sys.path.insert(0, str(Path(__file__).parents[1]))
from builders import tiny_cache

VOCABULARY = 300  # an embedding is a small share of a large student
WAYS = ("whole", "parts")


class Peak:
    """Largest memory of this process since it was made, sampled every two milliseconds; in MiB above what there was then."""

    def __init__(self) -> None:
        self._before = self._now()
        self._peak = self._before
        threading.Thread(target=self._watch, daemon=True).start()

    def _now(self) -> dict[str, float]:
        lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
        fields = {line[0].rstrip(":"): int(line[1]) / 1024 for line in lines if line[0] in ("RssAnon:", "VmRSS:")}
        return {"anonymous": fields["RssAnon"], "all": fields["VmRSS"]}

    def _watch(self) -> None:
        while True:
            self._peak = {name: max(value, self._peak[name]) for name, value in self._now().items()}
            time.sleep(0.002)

    def over(self, name: str = "anonymous") -> float:
        """Up to now."""
        return round(self._peak[name] - self._before[name], 1)


def student(width: int, layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
            num_attention_heads=width // 64, num_key_value_heads=width // 128, tie_word_embeddings=True,
        )
    )  # fmt: skip


def run(way: str, options: argparse.Namespace, output: Path) -> dict[str, float]:
    from transformers import TrainerCallback

    import deepspeed
    from teachercache.cache import Cache
    from teachercache.config import ObjectiveConfig, TrainConfig
    from teachercache.models.loading import load_causal_lm
    from teachercache.stream.order.batch_plan import BatchPlan
    from teachercache.stream.sources import train_order
    from teachercache.training.job.arguments import training_arguments
    from teachercache.training.job.launch import training_process
    from teachercache.training.trainer.trainer import DistillationTrainer

    figures: dict[str, float] = {}
    cache = Cache.open(options.work / "cache")
    with training_process() as process:
        rows = process.world_size
        config = TrainConfig(
            output=output, max_steps=1, global_batch=rows, micro_batch=1, zero_stage=3, save_every=10**6, trackers=(),
            loader_workers=0,
        )  # fmt: skip
        plan = BatchPlan(train_order(cache, seed=0), rows, 1, rows)
        made: dict[str, Any] = {}

        def arguments() -> Any:
            args = training_arguments(config, plan=plan, steps=1, evaluates=False, on_gpu=process.on_gpu)
            args.save_strategy = "no"
            return args

        deepspeed.init_distributed("gloo")  # what it takes is no student's
        peak = Peak()
        if way == "parts":
            made["args"] = arguments()
        model = load_causal_lm(str(options.work / "student"))
        made.setdefault("args", None)
        figures |= {"loaded": peak.over(), "mapped": peak.over("all")}

        class Started(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                figures["started"] = peak.over()

        trainer = DistillationTrainer(
            model=model, cache=cache, args=made["args"] or arguments(), objective=ObjectiveConfig(alpha=0.9, temperature=2.0),
            plan=plan, callbacks=[Started()],
        )  # fmt: skip
        trainer.train()
        figures["step"] = peak.over()
    return figures


def in_processes(way: str, options: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as found:
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={options.processes}",
        ]
        command = [*launcher, __file__, str(options.work), "--way", way, "--found", found]
        # What is freed leaves the process at once: else glibc keeps it, and a peak would count it with what comes later.
        freeing = {"MALLOC_MMAP_THRESHOLD_": str(2**18), "MALLOC_TRIM_THRESHOLD_": str(2**18)}
        subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, **freeing})
        each = [json.loads(path.read_text()) for path in Path(found).glob("*.json")]
    return {name: max(figures[name] for figures in each) for name in each[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    for name, value in (("processes", 4), ("width", 1024), ("layers", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--found", type=Path, help=argparse.SUPPRESS)
    add_output_options(parser)
    options = parser.parse_args()
    if options.way:
        with tempfile.TemporaryDirectory() as output:
            figures = run(options.way, options, Path(output))
        (options.found / f"{os.environ['RANK']}.json").write_text(json.dumps(figures))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    if not (options.work / "cache").is_dir():
        tiny_cache(options.work, targets={"logits": {"kind": "top-k", "k": 16, "dtype": "float32"}})
    model = student(options.width, options.layers)
    model.save_pretrained(options.work / "student")
    size = sum(weight.nbytes for weight in model.parameters()) / 2**20
    del model
    figures = {way: in_processes(way, options) for way in WAYS}
    result = {
        **provenance(), "processes": options.processes, "student": round(size, 1), "figures": figures,
        "of_student": {
            way: {name: round(value / size, 2) for name, value in found.items()} for way, found in figures.items()
        },
    }  # fmt: skip
    publish(result, options)


if __name__ == "__main__":
    main()
