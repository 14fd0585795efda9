"""Sections of the training job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import ByteSize, Field, model_validator

from teachercache.config.section import CacheLocation, Section

LOCAL_COPIES = Path("~/.cache/teachercache/shards")
LOCAL_COPIES_BYTES = 50 * 10**9


class LoraConfig(Section):
    """Low-rank adapters instead of all weights, through peft (Hu et al. 2022)."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0, description="adapters are scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | tuple[str, ...] = Field(
        "all-linear", description="names of layers, or all-linear: every linear layer but the output layer"
    )


class StudentConfig(Section):
    """The model that learns."""

    model: str = Field(description="Hugging Face id or local folder, e.g. one that `teachercache init-student` made")
    revision: str | None = None
    lora: LoraConfig | None = Field(
        None, description="train low-rank adapters; the exported student has them merged into its weights"
    )


class LayerTermConfig(Section):
    """A loss between layers of the student and the teacher's, as the cache stores them (`targets.hidden` and `.attention`)."""

    match: Literal[
        "hidden-cosine",
        "hidden-mse",
        "attention-kl",
        "attention-mse",
        "query-relations",
        "key-relations",
        "value-relations",
        "distances",
        "angles",
        "sample-distances",
        "channel-correlation",
    ]
    weight: float = Field(
        1.0, gt=0, description="of the term, beside the weights alpha and 1 - alpha of the logits' terms"
    )
    pairs: Literal["uniform", "first", "last"] | Annotated[dict[int, int], Field(min_length=1)] = Field(
        "uniform", description="which layers: by a rule, or {student's layer: teacher's layer}"
    )
    heads: Literal["average", "interpolate", "mix"] = Field(
        "average", description="attention-…: how the teacher's heads become as many as the student's"
    )
    relation_heads: int | None = Field(
        None, ge=1, description="…-relations: into how many heads vectors are cut; default: the student's"
    )
    centred: bool = Field(
        True, description="hidden states and structures: take the teacher's states less their mean over the corpus"
    )

    @model_validator(mode="after")
    def _of_this_term(self) -> LayerTermConfig:
        attention, relations = self.match.startswith("attention-"), self.match.endswith("-relations")
        allowed = {"heads": attention, "relation_heads": relations, "centred": not (attention or relations)}
        for name, is_allowed in allowed.items():
            if not is_allowed and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} means nothing to {self.match}; leave it out")
        return self


class AcrossTermConfig(Section):
    """A loss of a student whose tokenizer is another than the teacher's; the cache needs an alignment with it."""

    match: Literal["projected-kl", "chunk-likelihood", "sorted-probabilities"]
    weight: float = Field(1.0, gt=0, description="beside other terms; all of them together are weighted by alpha")
    tau: float = Field(
        100.0, ge=1, description="chunk-likelihood: binarisation temperature; likelihoods p become p^(1 / tau)"
    )
    boundaries: bool = Field(
        True,
        description="chunk-likelihood: weigh each chunk by the mass on tokens that begin a new pre-token after it",
    )

    @model_validator(mode="after")
    def _of_this_term(self) -> AcrossTermConfig:
        for name in ("tau", "boundaries"):
            if self.match != "chunk-likelihood" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} means nothing to {self.match}; leave it out")
        return self


ACROSS = (AcrossTermConfig(match="projected-kl"), AcrossTermConfig(match="chunk-likelihood"))


class ObjectiveConfig(Section):
    """`L = alpha * T^2 * D(teacher_T, student_T) + (1 - alpha) * CE` (Hinton, Vinyals & Dean 2015)."""

    alpha: float = Field(0.9, ge=0, le=1)
    temperature: float = Field(1.0, gt=0, description="any T >= 1; with targets on a grid, one of it")
    divergence: Literal["forward-kl", "reverse-kl", "jensen-shannon", "total-variation"] = Field(
        "forward-kl", description="D: forward-kl covers all that the teacher does, reverse-kl seeks its main mode"
    )
    mixing: float = Field(
        0.5, gt=0, lt=1, description="the teacher's share in the mixture of jensen-shannon; 0.5 is the symmetric one"
    )
    tail: Literal["auto", "ghost", "uniform", "renormalise", "sketch"] = Field(
        "auto",
        description="tokens outside the head: one bucket with their exact mass (ghost), alike (uniform), dropped "
        "(renormalise) or each with its own share (sketch); auto: sketch, ghost "
        "or renormalise, the first that the targets allow",
    )

    layers: tuple[LayerTermConfig, ...] = Field((), description="losses between layers, added to the ones above")
    across: tuple[AcrossTermConfig, ...] = Field(
        ACROSS,
        min_length=1,
        description="in the place of the divergence, for a student with another tokenizer than the teacher's",
    )

    @model_validator(mode="after")
    def _each_across_once(self) -> ObjectiveConfig:
        matches = [term.match for term in self.across]
        if len(set(matches)) < len(matches):
            raise ValueError(f"across has {max(matches, key=matches.count)} twice; give it once, with a weight")
        return self

    @model_validator(mode="after")
    def _finite_divergence(self) -> ObjectiveConfig:
        if self.divergence == "reverse-kl" and self.tail == "renormalise":
            raise ValueError(
                "reverse-kl is infinite against a tail of mass zero, which renormalise makes; use tail: ghost or uniform"
            )
        return self


class MixConfig(Section):
    """A further cache that the student learns from beside the recipe's `cache`; its tokenizer must be the same."""

    cache: CacheLocation
    share: float | None = Field(
        None, gt=0, lt=1, description="of the rows in training; default: a row of it comes as often as one of `cache`"
    )


class StreamConfig(Section):
    """How rows come out of caches. A cache in an object store is read through local copies of its files, which all
    processes and jobs of a machine share."""

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
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1, description="overrides epochs")
    global_batch: int = Field(16, ge=1, description="rows in one optimizer step, over all processes")
    micro_batch: int = Field(4, ge=1, description="rows in one forward pass of one process")
    pack: bool = Field(
        False,
        description="put short rows of a micro-batch into one sequence, isolated from each other, instead of padding",
    )
    learning_rate: float = Field(3e-4, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_fraction: float = Field(0.05, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    zero_stage: Literal[0, 1, 2, 3] = 1
    deepspeed: Path | None = Field(
        None, description="a DeepSpeed JSON file of your own; wins over zero_stage and precision"
    )
    gradient_checkpointing: bool = False
    seed: int = 0
    evaluate_every: int | None = Field(None, ge=1, description="steps; default: once an epoch")
    save_every: int | None = Field(None, ge=1, description="steps; default: as evaluate_every")
    keep_checkpoints: int = Field(2, ge=1, description="latest checkpoints to keep; the best one is kept besides")
    log_every: int = Field(10, ge=1)
    loader_workers: int = Field(1, ge=0, description="background processes that decode batches")
    trackers: tuple[str, ...] = Field(("tensorboard",), description="experiment trackers of transformers, or none")

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> TrainConfig:
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"global_batch ({self.global_batch}) must be a multiple of micro_batch ({self.micro_batch})"
            )
        return self
