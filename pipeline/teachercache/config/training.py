"""Sections of the training job."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ByteSize, Field, model_validator

from teachercache.config.location import CacheLocation
from teachercache.section import Section

LOCAL_COPIES = Path("~/.cache/teachercache/shards")
LOCAL_COPIES_BYTES = 50 * 10**9


class LoraConfig(Section):
    """Low-rank adapters instead of all weights, through peft (Hu et al. 2022)."""

    rank: int = Field(16, ge=1, description="rank of the adapters")
    alpha: float = Field(32, gt=0, description="adapters are scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the inputs of the adapters, while training")
    target_modules: str | tuple[str, ...] = Field(
        "all-linear",
        description="as peft reads it: a list of names or their last parts, a regular expression of whole names, or "
        "all-linear: every linear layer but the output layer",
    )


class StudentConfig(Section):
    """The model that learns."""

    model: str = Field(description="Hugging Face id or local folder, e.g. one that `teachercache init-student` made")
    revision: str | None = Field(None, description="hub commit, tag or branch")
    attention: str | None = Field(
        None,
        description="attn_implementation of transformers, in training and evaluation: sdpa, eager, flex_attention, "
        "flash_attention_2 or another flash kernel, which takes all packed rows of a micro-batch as one and forms no mask",
    )
    lora: LoraConfig | None = Field(
        None, description="train low-rank adapters; the exported student has them merged into its weights"
    )


class MixConfig(Section):
    """A further cache that the student learns from beside the recipe's `cache`; its tokenizer must be the same."""

    cache: CacheLocation = Field(description="a folder, or a URL")
    share: float | None = Field(
        None, gt=0, lt=1, description="of the rows in training; default: a row of it comes as often as one of `cache`"
    )


class StreamConfig(Section):
    """Order and mixture of rows from caches. A cache in an object store is read through local copies of its files,
    which all processes and jobs of a machine share."""

    window: int = Field(
        64,
        ge=1,
        description="shards whose rows are shuffled together (shards are shuffled too); a reader needs two windows at a time",
    )
    mix: tuple[MixConfig, ...] = Field((), description="further caches; an epoch is one pass over `cache`")
    local: Path = Field(LOCAL_COPIES, description="folder of the local copies, on a fast disk")
    local_bytes: ByteSize = Field(
        ByteSize(LOCAL_COPIES_BYTES),
        ge=1,
        description="most bytes of local copies, e.g. 50 GB; the longest unused go first",
    )


class TrainConfig(Section):
    """The training job: `transformers.Trainer` under DeepSpeed ZeRO."""

    output: Path = Field(description="run folder: checkpoints, logs, and the exported student in OUTPUT/student")
    epochs: float = Field(1.0, gt=0, description="passes over the training rows of `cache`")
    max_steps: int | None = Field(None, ge=1, description="overrides epochs")
    global_batch: int = Field(16, ge=1, description="rows in one optimizer step, over all processes")
    micro_batch: int = Field(4, ge=1, description="rows in one forward pass of one process")
    pack: bool = Field(
        False,
        description="put short rows of a micro-batch into one sequence, isolated from each other, instead of padding",
    )
    learning_rate: float = Field(3e-4, gt=0, description="the highest one, after the warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine",
        description="how the learning rate falls after the warm-up: not at all, in a line to 0, along a cosine to 0",
    )
    warmup_fraction: float = Field(
        0.05, ge=0, le=1, description="share of the steps in which the learning rate rises from 0"
    )
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    max_grad_norm: float = Field(
        1.0, gt=0, description="gradients longer than this are scaled down to it; all terms of the loss share it"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="of the forward and backward pass; the optimizer stays in fp32"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1,
        description="what processes divide among them: 0 nothing (in bf16 as 1), 1 the optimizer's state, 2 gradients too, "
        "3 weights too",
    )
    deepspeed: Path | None = Field(
        None, description="a DeepSpeed JSON file of your own; wins over zero_stage and precision"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass: less memory, more time"
    )
    seed: int = Field(0, description="of the order of rows, of dropout and of new adapters")
    evaluate_every: int | None = Field(None, ge=1, description="steps; default: once an epoch")
    save_every: int | None = Field(None, ge=1, description="steps; default: as evaluate_every")
    keep_checkpoints: int = Field(2, ge=1, description="latest checkpoints to keep; the best one is kept besides")
    log_every: int = Field(10, ge=1, description="steps between two lines of the log")
    loader_workers: int = Field(1, ge=0, description="background processes that decode batches")
    trackers: tuple[str, ...] = Field(("tensorboard",), description="experiment trackers of transformers, or none")

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> TrainConfig:
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"global_batch ({self.global_batch}) must be a multiple of micro_batch ({self.micro_batch})"
            )
        return self
