"""Memory and time that half precision saves: steps of a student in fp32, bf16 and fp16, as the training job runs them.

    python tests/bench/precision_memory.py WORK_FOLDER [--layers 8] [--rows 4] [--length 512] [--zero 1] [--steps 8] [--json]

A student of SmolLM2-135M's width under DeepSpeed, distilled from a synthetic cache of kind top-k (what the numbers mean does
not matter here); each precision in a process of its own, on the GPU if there is one. Megabytes:

    weights      the model as it computes
    optimizer    master weights and both moments of AdamW, without those weights that are the model's own
    step         peak above what was held before the first step: gradients, optimizer, activations, loss
    peak         the same with weights (on a CPU: resident memory above that before the model was there)

and `milliseconds`, the median of a step but for the first.

On a CPU DeepSpeed offers fp16 only where the processor computes in it; where it refuses, the reason is recorded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from provenance import add_output_options, provenance, publish
from synthetic_cache import V, top_k_cache

PRECISIONS = ("fp32", "bf16", "fp16")


def student(layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
            num_key_value_heads=3, tie_word_embeddings=True,
        )
    )  # fmt: skip


def run(precision: str, options: argparse.Namespace, output: Path) -> dict[str, Any]:
    from teachercache.cache import Cache
    from teachercache.config import ObjectiveConfig, TrainConfig
    from teachercache.stream.order.batch_plan import BatchPlan
    from teachercache.stream.sources import train_order
    from teachercache.training.job.arguments import training_arguments
    from teachercache.training.job.launch import training_process
    from teachercache.training.trainer.trainer import DistillationTrainer

    cache = Cache.open(options.work / f"cache-{options.length}")
    config = TrainConfig(
        output=output, max_steps=options.steps, global_batch=options.rows, micro_batch=options.rows,
        precision=precision, zero_stage=options.zero, save_every=10**6, trackers=(), loader_workers=0,
    )  # fmt: skip
    plan = BatchPlan(train_order(cache, seed=0), options.rows, options.rows, 1)
    with training_process() as process:
        before = Memory(on_gpu=process.on_gpu)
        model = student(options.layers)
        args = training_arguments(
            config, plan=plan, steps=plan.steps(config.epochs), evaluates=False, on_gpu=process.on_gpu
        )
        args.save_strategy = "no"
        meter = StepMeter(process.on_gpu)
        objective = ObjectiveConfig(alpha=0.9, temperature=2.0)
        trainer = DistillationTrainer(
            model=model, cache=cache, args=args, objective=objective, plan=plan, callbacks=[meter.callback()]
        )
        trainer.train()
        weights, optimizer = bytes_of(trainer.deepspeed)
        figures = {"weights": weights / 2**20, "optimizer": optimizer / 2**20}
        figures |= {"step": meter.memory.peak_over(), "peak": before.now_peak() - before.held}
    figures["milliseconds"] = 1000 * statistics.median(meter.seconds[1:])
    return {name: round(value) for name, value in figures.items()}


class Memory:
    """Megabytes that the process holds, and the most since it was asked to begin."""

    def __init__(self, *, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated() / 2**20
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self.held = resident("VmRSS")

    def now_peak(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**20 if self.on_gpu else resident("VmHWM")

    def peak_over(self) -> float:
        return self.now_peak() - self.held


def resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


class StepMeter:
    """Begins to count when training does, after DeepSpeed has cast the model."""

    def __init__(self, on_gpu: bool) -> None:
        self.memory = Memory(on_gpu=on_gpu)
        self.seconds: list[float] = []
        self._on_gpu, self._began = on_gpu, 0.0

    def now(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def callback(self) -> Any:
        from transformers import TrainerCallback

        meter = self

        class Begin(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                meter.memory = Memory(on_gpu=meter._on_gpu)

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                meter._began = meter.now()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                meter.seconds.append(meter.now() - meter._began)

        return Begin()


def bytes_of(engine: Any) -> tuple[int, int]:
    """Bytes of the model's weights, and of all that the optimizer keeps besides."""
    seen = {
        parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes()
        for parameter in engine.module.parameters()
    }
    weights = sum(seen.values())
    inner = engine.optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    kept = [tensor for group in inner.param_groups for tensor in group["params"]]
    kept += [value for state in inner.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return weights, sum(size for pointer, size in storages.items() if pointer not in seen)


def in_process(precision: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, str(options.work), "--precision", precision]
    command += [f"--{name}={getattr(options, name)}" for name in ("layers", "rows", "length", "zero", "steps")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = [line for line in done.stderr.splitlines() if line.strip()][-1]
        print(f"{precision}: {reason}", file=sys.stderr)
        return {"refused": reason.partition(": ")[2]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    for name, value in (("layers", 8), ("rows", 4), ("length", 512), ("zero", 1), ("steps", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--precision", choices=PRECISIONS, help=argparse.SUPPRESS)
    add_output_options(parser)
    options = parser.parse_args()
    if options.precision:
        with tempfile.TemporaryDirectory() as output:
            print(json.dumps(run(options.precision, options, Path(output))))
        return
    folder = options.work / f"cache-{options.length}"
    if not folder.is_dir():
        top_k_cache(folder, count=8 * options.rows, length=options.length)
    figures = {precision: in_process(precision, options) for precision in PRECISIONS}
    whole = figures["fp32"]
    result = {
        **provenance(),
        **{name: getattr(options, name) for name in ("layers", "rows", "length", "zero", "steps")},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "figures": figures,
        "of_fp32": {
            precision: {name: round(value / whole[name], 2) for name, value in by.items()}
            for precision, by in figures.items()
            if "refused" not in by and precision != "fp32"
        },
    }
    publish(result, options)


if __name__ == "__main__":
    main()
