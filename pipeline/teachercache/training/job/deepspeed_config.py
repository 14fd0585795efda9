"""A recipe's `train:` section to a DeepSpeed configuration.

Also ZeRO stage 0 (plain data parallelism) and a single process run under DeepSpeed, so that every stage has the same
checkpoints, clipping and loss scaling. Batch sizes are `auto`: they follow from the recipe and the number of processes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from teachercache.config import TrainConfig
from teachercache.errors import RecipeError

Precision = Literal["fp32", "bf16", "fp16"]

# Elements in a communication bucket. DeepSpeed's default of 5e8 takes 2 GB of a GPU; from 5e7 on speed hardly changes.
BUCKET_ELEMENTS = 50_000_000
# Norms and biases stay whole on every GPU; gathering them one by one costs more than they weigh.
PERSISTENT_ELEMENTS = 10_000


def deepspeed_config(config: TrainConfig, *, on_gpu: bool) -> dict[str, Any]:
    """The configuration for a recipe; the user's own file, where there is one, wins over stage and precision.

    Raises `RecipeError` when that file is missing, no JSON object, or offloads to NVMe.
    """
    settings = own_deepspeed_settings(config)
    merged = _made(config, on_gpu=on_gpu) if settings is None else {**_batch_settings(), **settings}
    zero = {"stage": 0, **merged.get("zero_optimization", {})}
    # Stage 3 would save shards alone, and nothing could be exported.
    return {**merged, "zero_optimization": {**zero, "stage3_gather_16bit_weights_on_model_save": True}}


def precision_of(settings: dict[str, Any], default: Precision) -> Precision:
    """The precision that a configuration asks for; `auto` stands for the recipe's."""
    for name in ("bf16", "fp16"):
        enabled = settings.get(name, {}).get("enabled", False)
        if enabled is True or (enabled == "auto" and default == name):
            return name
    return "fp32"


def least_stage(config: TrainConfig) -> int:
    """The recipe's ZeRO stage, but 1 for 0 in bf16: DeepSpeed 0.19.8 sums the gradients of micro-batches and processes in bf16
    there, which drops what is 2^-8 of the sum, and refuses `grad_accum_dtype`. Stage 1 learns the same, in less memory."""
    return 1 if config.precision == "bf16" and config.zero_stage == 0 else config.zero_stage


def _made(config: TrainConfig, *, on_gpu: bool) -> dict[str, Any]:
    stage = least_stage(config)
    zero = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": on_gpu and stage > 0,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
    }
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
            "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
        }
    settings = {**_batch_settings(), **_precision_settings(config.precision), "zero_optimization": zero}
    if config.precision == "bf16":
        # Micro-batches' gradients are summed in float32: bf16 would drop what is 2^-8 of the sum.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _batch_settings() -> dict[str, Any]:
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,  # torch's own AdamW
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's would be compiled first, for a minute
        "steps_per_print": 10**9,
    }


def _precision_settings(precision: Precision) -> dict[str, Any]:
    if precision == "bf16":
        return {"bf16": {"enabled": True}}
    if precision == "fp16":  # loss_scale 0 = dynamic: halved at an overflow, doubled after a window without one
        scaling = {"loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2}
        return {"fp16": {"enabled": True, **scaling, "min_loss_scale": 1}}
    return {}


def own_deepspeed_settings(config: TrainConfig) -> dict[str, Any] | None:
    """Reads the settings of the user's own file; None where the recipe names none. Raises `RecipeError` as above."""
    path = config.deepspeed
    if path is None:
        return None
    if not path.is_file():
        raise RecipeError(f"train.deepspeed: {path} does not exist; examples are in infra/deepspeed/")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"train.deepspeed: {path} is not JSON: {error}; mend that line") from None
    if not isinstance(data, dict):
        raise RecipeError(f"train.deepspeed: {path} must hold an object, not {type(data).__name__}")
    _check_offloading(data, path)
    return _without_load_universal(data)


def _without_load_universal(data: dict[str, Any]) -> dict[str, Any]:
    """Drops `load_universal`: whether a conversion is loaded depends on what there is to resume from, see
    elastic.py."""
    section = {name: value for name, value in data.get("checkpoint", {}).items() if name != "load_universal"}
    rest = {name: value for name, value in data.items() if name != "checkpoint"}
    return {**rest, "checkpoint": section} if section else rest


def _check_offloading(settings: dict[str, Any], path: Path) -> None:
    """Refuse what cannot be resumed: DeepSpeed 0.19.8 neither says so nor restores weights and moments from there."""
    for name in ("offload_optimizer", "offload_param"):
        where = (settings.get("zero_optimization") or {}).get(name) or {}
        if where.get("device") == "nvme":
            raise RecipeError(
                f"train.deepspeed: {path}: DeepSpeed does not resume a run with {name} on nvme as it was; "
                'use "device": "cpu"'
            )
