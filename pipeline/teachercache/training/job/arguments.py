"""A recipe's `train:` section to `transformers.TrainingArguments`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations

from teachercache.config import TrainConfig
from teachercache.errors import RecipeError
from teachercache.stream.order.batch_plan import Plan
from teachercache.training.job.deepspeed_config import Precision, deepspeed_config, precision_of

SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def training_arguments(
    config: TrainConfig, *, plan: Plan, steps: int, evaluates: bool, on_gpu: bool
) -> TrainingArguments:
    """Arguments for `DistillationTrainer`; creating them starts torch.distributed.

    Raises `RecipeError` where a tracker is not installed, the device cannot compute in the asked-for precision, or a
    DeepSpeed file of the user's contradicts the recipe.
    """
    settings = deepspeed_config(config, on_gpu=on_gpu)
    precision = precision_of(settings, config.precision)
    _check_precision(precision)
    evaluate_every = config.evaluate_every or plan.steps_per_epoch
    try:
        args = TrainingArguments(
            output_dir=str(config.output),
            max_steps=steps,
            per_device_train_batch_size=config.micro_batch,
            gradient_accumulation_steps=plan.micro_steps,
            learning_rate=config.learning_rate,
            lr_scheduler_type=SCHEDULES[config.schedule],
            warmup_steps=round(config.warmup_fraction * steps),
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            optim="adamw_torch",
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            use_cpu=not on_gpu,
            deepspeed=settings,
            gradient_checkpointing=config.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
            seed=config.seed,
            dataloader_num_workers=config.loader_workers,
            logging_steps=config.log_every,
            eval_strategy="steps" if evaluates else "no",
            eval_steps=evaluate_every if evaluates else None,
            metric_for_best_model="loss",
            greater_is_better=False,
            save_strategy="steps",
            save_steps=config.save_every or evaluate_every,
            report_to=_trackers(config),
            disable_tqdm=True,
            log_level="warning",
        )
    except ValueError as error:
        raise RecipeError(f"train: {' '.join(str(error).split())}") from error
    _tell_deepspeed()
    return args


def _tell_deepspeed() -> None:
    """On a CPU accelerate starts torch.distributed alone: DeepSpeed, when it loads a student under ZeRO 3, would see a world of
    one process."""
    import deepspeed.comm

    if torch.distributed.is_initialized() and not deepspeed.comm.is_initialized():
        deepspeed.comm.init_distributed(auto_mpi_discovery=False)


def _trackers(config: TrainConfig) -> list[Any]:
    names = [name for name in config.trackers if name != "none"]
    available = get_available_reporting_integrations()
    for name in names:
        if name not in available:
            here = f"these are: {', '.join(available)}" if available else "none is"
            raise RecipeError(
                f"train.trackers: {name} is unknown or not installed ({here}); install it, or set it to []"
            )
    return names or ["none"]


def _check_precision(precision: Precision) -> None:
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    supported = {"fp32": True, "bf16": device.is_bf16_supported(), "fp16": bool(device.is_fp16_supported())}
    if not supported[precision]:
        others = " or ".join(other for other, works in supported.items() if works)
        raise RecipeError(
            f"train.precision: this machine cannot train in {precision} ({device.device_name()}); use {others}"
        )
