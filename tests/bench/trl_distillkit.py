"""Time and memory of a training step: this trainer on a cache, TRL's GKD with a live teacher, DistillKit on stored logits.

    pip install trl click
    git clone https://github.com/arcee-ai/DistillKit
    python tests/bench/trl_distillkit.py WORK_FOLDER --distillkit DistillKit [--steps 4] [--rounds 2] [--arms ours ...] [--json]

The same student (4 of SmolLM2-135M's 30 layers), the same rows of exactly 256 tokens in the same order and batches, float32,
AdamW, one process without loading workers; every trainer by its own documented way:

    ours                 `DistillationTrainer` on a cache of the default kind, alpha 0.5, T = 1
    trl                  `GKDTrainer`, off-policy (lmbda = 0) and forward KL (beta = 0), with the teacher beside the student
    trl, checkpointing   the same with gradient checkpointing, TRL's own default
    distillkit, 50       DistillKit's trainer on its compressed logits, its budget pick: k = 50; CE and KL by half, T = 1
    distillkit, 128      ... its recommended configuration, k = 128

Each arm has a process of its own, which takes so many steps; arms take turns, medians over all steps but the first of a
process. `over_loaded_megabytes` is the peak of resident memory above that with all models loaded (gradients, optimizer and
activations), `peak_megabytes` includes the models.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kd_against_ce import teachercache
from numpy.typing import NDArray
from provenance import add_output_options, provenance, publish
from transformers import TrainerCallback

from teachercache.cache import Cache
from teachercache.models.loading import load_causal_lm
from teachercache.quickstart import write_recipe
from teachercache.stream.order.batch_plan import BatchPlan
from teachercache.stream.sources import train_order
from teachercache.stream.tokenizers import teacher_tokenizer

LENGTH, LAYERS, RATE = 256, "keep:4", 1e-4
COMPRESSORS: dict[str, dict[str, Any]] = {
    "distillkit, 50": {"k": 50, "exact_k": 1, "polynomial_terms": [0, 1, "sqrt"]},
    "distillkit, 128": {"k": 128, "exact_k": 16, "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"]},
}
COMPRESSOR = {
    "exact_dtype": "bfloat16",
    "term_dtype": "float32",
    "residual_bins": [],
    "delta_encoding": False,
    "error_diffusion": False,
}
ARMS = ("ours", "trl", "trl, checkpointing", *COMPRESSORS)


@dataclass(frozen=True)
class Chosen(BatchPlan):
    """A plan over some rows of a split."""

    chosen: tuple[int, ...] = ()

    def step_rows(self, step: int) -> NDArray[np.int64]:
        return np.array(self.chosen)[np.arange(step * self.global_batch, (step + 1) * self.global_batch)]


class Setting:
    """Parts that all arms have in common: made by the first call, found by the others."""

    def __init__(self, work: Path, *, steps: int, rows: int) -> None:
        recipe_file, self.recipe = write_recipe(work / "sketch", ["targets.logits={preset: compact}"])
        assert self.recipe.teacher is not None
        self.teacher = self.recipe.teacher.model
        if not (self.recipe.cache / "manifest.json").is_file():
            teachercache("precompute", str(recipe_file))
        self.cache = Cache.open(self.recipe.cache)
        self.student = work / "student"
        if not (self.student / "config.json").is_file():
            teachercache("init-student", self.teacher, "--layers", LAYERS, "--out", str(self.student))
        tokens = {
            index: self.cache.read_row("train", index, columns=()).row for index in range(self.cache.rows_of("train"))
        }
        whole = [index for index, row in tokens.items() if row.length == LENGTH]
        if len(whole) < steps * rows:
            raise SystemExit(f"the cache has {len(whole)} rows of {LENGTH} tokens; choose fewer --steps or --rows")
        self.chosen = tuple(whole[: steps * rows])
        self.ids_RS = np.stack([tokens[index].input_ids_S for index in self.chosen]).astype(np.int64)
        self.steps, self.rows, self.work = steps, rows, work

    def arguments(self, output: str) -> dict[str, Any]:
        return {
            "output_dir": output, "max_steps": self.steps, "per_device_train_batch_size": self.rows, "use_cpu": True,
            "learning_rate": RATE, "report_to": [], "save_strategy": "no", "logging_steps": 10**6, "disable_tqdm": True,
            "train_sampling_strategy": "sequential", "bf16": False, "gradient_checkpointing": False,
        }  # fmt: skip


class Meter(TrainerCallback):
    """Seconds of each step, and resident memory from the first step on."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self.loaded = resident("VmRSS")
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)
        self.began = time.perf_counter()

    def result(self) -> dict[str, Any]:
        peak = resident("VmHWM")
        return {"seconds": self.seconds, "peak_megabytes": peak, "over_loaded_megabytes": peak - self.loaded}


def resident(name: str) -> float:
    """Megabytes of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def run_ours(setting: Setting, arguments: dict[str, Any], meter: Meter) -> Any:
    from transformers import TrainingArguments

    from teachercache.config import ObjectiveConfig
    from teachercache.training.trainer.trainer import DistillationTrainer

    batch = setting.rows
    plan = Chosen(train_order(setting.cache, seed=0), batch, batch, 1, chosen=setting.chosen)
    return DistillationTrainer(
        model=load_causal_lm(str(setting.student), dtype="float32"),
        cache=setting.cache,
        objective=ObjectiveConfig(alpha=0.5, temperature=1.0),
        args=TrainingArguments(**arguments),
        plan=plan,
        callbacks=[meter],
    )


def run_trl(setting: Setting, arguments: dict[str, Any], meter: Meter) -> Any:
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids_BS = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS), "labels": ids_BS.clone()}

    return GKDTrainer(
        model=load_causal_lm(str(setting.student), dtype="float32"),
        teacher_model=load_causal_lm(setting.teacher, dtype="float32"),
        args=GKDConfig(**arguments, lmbda=0.0, beta=0.0, max_length=LENGTH),
        data_collator=collate,
        train_dataset=Dataset.from_dict({"input_ids": setting.ids_RS.tolist()}),
        processing_class=teacher_tokenizer(setting.cache),
        callbacks=[meter],
    )


def run_distillkit(setting: Setting, arguments: dict[str, Any], meter: Meter, arm: str) -> Any:
    from datasets import load_from_disk
    from distillkit.compression import LogprobCompressor
    from distillkit.configuration import DistillationRunConfig
    from distillkit.main import collate_packed_batch
    from distillkit.signals import OfflineSignalSource
    from distillkit.trainer import DistillationTrainer
    from trl import SFTConfig

    vocabulary = setting.cache.manifest.vocabulary_size
    folder = str(stored_logits(setting, arm))
    quantised = {**COMPRESSOR, **COMPRESSORS[arm], "d": vocabulary}
    kl = {"function": "kl", "temperature": 1.0, "missing_probability_handling": "zero", "sparse_chunk_length": 1024}
    config = DistillationRunConfig.model_validate(
        {
            "model": str(setting.student),
            "dataset": {"train_dataset": {"disk_path": folder}, "prepacked": True},
            "teacher": {"kind": "dataset", "logprob_compressor": quantised},
            "sequence_length": LENGTH,
            "output_path": arguments["output_dir"],
            "loss_functions": [{"function": "cross_entropy", "weight": 0.5}, {**kl, "weight": 0.5}],
        }
    )
    settings = {"max_length": LENGTH, "remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    compressor = LogprobCompressor(config=config.teacher.logprob_compressor)
    return DistillationTrainer(
        model=load_causal_lm(str(setting.student), dtype="float32"),
        config=config,
        signal_source=OfflineSignalSource(compressor, vocab_size=vocabulary),
        true_vocab_size=vocabulary,
        args=SFTConfig(**arguments, **settings),
        train_dataset=load_from_disk(folder),
        data_collator=collate_packed_batch,
        processing_class=teacher_tokenizer(setting.cache),
        callbacks=[meter],
    )


@torch.no_grad()
def stored_logits(setting: Setting, arm: str) -> Path:
    """DistillKit's dataset of the rows: what its sampler writes, made with its compressor."""
    from datasets import Dataset
    from distillkit.compression import DistributionQuantizationConfig, LogprobCompressor

    vocabulary = setting.cache.manifest.vocabulary_size
    folder = setting.work / f"distillkit-{COMPRESSORS[arm]['k']}-{len(setting.chosen)}"
    if not folder.is_dir():
        compressor = LogprobCompressor(DistributionQuantizationConfig(**COMPRESSOR, **COMPRESSORS[arm], d=vocabulary))
        teacher, rows = load_causal_lm(setting.teacher, dtype="float32").eval(), []
        for ids_S in setting.ids_RS:
            log_prob_SV = (
                teacher(torch.from_numpy(ids_S)[None], use_cache=False).logits[0, :, :vocabulary].log_softmax(-1)
            )
            stored = {name: values.tolist() for name, values in compressor.compress(log_prob_SV).items()}
            rows.append({"input_ids": ids_S.tolist(), **stored})
        Dataset.from_list(rows).save_to_disk(str(folder))
    return folder


def run_arm(arm: str, setting: Setting, *, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as output:
        meter, arguments = Meter(), setting.arguments(output)
        make: Callable[[], Any] = {
            "ours": lambda: run_ours(setting, arguments, meter),
            "trl": lambda: run_trl(setting, arguments, meter),
            "trl, checkpointing": lambda: run_trl(setting, {**arguments, "gradient_checkpointing": True}, meter),
        }.get(arm, lambda: run_distillkit(setting, arguments, meter, arm))
        make().train()
    return meter.result()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    setting = Setting(options.work, steps=options.steps, rows=options.rows)
    for arm in set(COMPRESSORS) & set(
        options.arms
    ):  # in a process of their own, as the teacher's memory would be counted
        in_process(arm, options, "--store")
    del setting
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in options.arms}
    for number in range(options.rounds):
        turn = number % len(options.arms)
        for arm in (*options.arms[turn:], *options.arms[:turn]):
            runs[arm].append(in_process(arm, options))
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    figures = {
        arm: {
            "seconds": round(statistics.median(second for run in done for second in run["seconds"][1:]), 3),
            **{
                name: round(statistics.median(run[name] for run in done))
                for name in ("peak_megabytes", "over_loaded_megabytes")
            },
        }
        for arm, done in runs.items()
    }
    return {
        **provenance(),
        **{name: getattr(options, name) for name in ("steps", "rounds", "rows", "threads")},
        "arms": figures,
        "over_ours": {
            arm: {name: round(value / figures["ours"][name], 2) for name, value in by.items()}
            for arm, by in figures.items()
            if "ours" in figures and arm != "ours"
        },
    }


def in_process(arm: str, options: argparse.Namespace, *flags: str) -> dict[str, Any]:
    command = [sys.executable, __file__, str(options.work), "--arm", arm, *flags]
    command += [f"--{name}={getattr(options, name)}" for name in ("steps", "rows", "threads")]
    command += ["--distillkit", str(options.distillkit)] if options.distillkit else []
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def check_peers(arms: list[str]) -> None:
    if any(arm != "ours" for arm in arms) and find_spec("trl") is None:
        raise SystemExit("TRL is not installed: pip install trl, or choose --arms ours")
    if set(COMPRESSORS) & set(arms) and find_spec("distillkit") is None:
        raise SystemExit(
            "DistillKit is not there: clone github.com/arcee-ai/DistillKit and give its folder as --distillkit"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    for name, value in (("steps", 4), ("rounds", 2), ("rows", 4), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--distillkit", type=Path, help="a checkout of DistillKit, where it is not installed")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--store", action="store_true", help=argparse.SUPPRESS)
    add_output_options(parser)
    options = parser.parse_args()
    if options.distillkit:
        sys.path.insert(0, str(options.distillkit.resolve()))
    check_peers([options.arm] if options.arm else options.arms)
    if options.arm:
        setting = Setting(options.work, steps=options.steps, rows=options.rows)
        if options.store:
            print(json.dumps({"stored": str(stored_logits(setting, options.arm))}))
        else:
            print(json.dumps(run_arm(options.arm, setting, threads=options.threads)))
        return
    result = measure(options)
    publish(result, options)


if __name__ == "__main__":
    main()
