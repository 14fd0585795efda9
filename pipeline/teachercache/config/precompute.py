"""Sections of the precompute job, but for what is stored of the teacher (targets.py)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from teachercache.section import Section

RowPrefix = Literal["auto", "bos", "eos", "none"]


class TeacherConfig(Section):
    """The teacher: which model, in which precision."""

    model: str = Field(
        description="Hugging Face id, local folder, .gguf file, or package://NAME/FILE in an installed package"
    )
    revision: str | None = Field(None, description="hub commit, tag or branch")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="precision of the teacher's weights; auto: the checkpoint's own"
    )
    trust_remote_code: bool = Field(
        False, description="run Python code that comes with the model; for the teacher alone"
    )
    attention: str | None = Field(
        None,
        description="attn_implementation of transformers: sdpa, eager, flex_attention, flash_attention_2 or another flash "
        "kernel, which takes all packed rows of a batch as one and forms no mask",
    )
    backend: str = Field(
        "transformers",
        description="what runs the model: transformers, or a backend that an installed extension adds; noted in the cache, and "
        "no part of its fingerprint",
    )


class CorpusConfig(Section):
    """Sources of rows. A row is one document or one conversation."""

    source: str = Field(description="dataset name, file, folder or glob; `python-docs` is CPython's own documentation")
    format: Literal["auto", "datasets", "parquet", "jsonl", "text", "python-docs"] = Field(
        "auto", description="what kind of source it is; auto: by its name or by the suffix of its files"
    )
    name: str | None = Field(None, description="configuration of a Hugging Face dataset")
    revision: str | None = Field(None, description="hub commit, tag or branch of a Hugging Face dataset")
    split: str = Field("train", description="split of a Hugging Face dataset, slices as in train[:10%]")
    streaming: bool = Field(
        False,
        description="read a Hugging Face dataset without downloading all of it first; use `limit` instead of a slice",
    )
    text_field: str = Field("text", description="column or key that holds the text of a row")
    messages_field: str | None = Field(
        None, description="chat rows: a list of {role, content}; loss on assistant tokens"
    )
    limit: int | None = Field(None, ge=1, description="read at most so many rows")
    deduplicate: bool = Field(True, description="drop rows whose content occurred before, and count them")
    held_out: float = Field(0.05, ge=0, lt=1, description="share of rows kept for evaluation, chosen by content hash")
    store_text: bool = Field(
        True, description="keep the text beside the tokens; alignment to other tokenizers needs it"
    )


class SequenceConfig(Section):
    """Rules by which documents become token sequences."""

    layout: Literal["documents", "packed"] = Field(
        "documents",
        description="documents: a row is one document, or a window of it; packed: several, isolated from each other",
    )
    length: int = Field(
        512,
        ge=2,
        description="most tokens in a sequence; longer documents are split into several rows; no text is lost",
    )
    add_eos: bool = Field(True, description="end every text document with the tokenizer's end-of-sequence token")
    prefix: RowPrefix = Field(
        "auto",
        description="what every row, and every packed segment, begins with: auto = what the tokenizer puts before a text, or "
        "the chat template before a conversation; the beginning- or end-of-sequence token; none. Context, never a target; "
        "counts in `length`",
    )
    context: int = Field(
        0,
        ge=0,
        description="tokens that a window of a long document reads again from the one before it, beyond the one that its "
        "first label needs; no targets. Costs context / (length - context) more work of teacher and students, and as many more "
        "stored tokens: 14 % for 64 of 512",
    )

    @model_validator(mode="after")
    def _room_for_targets(self) -> SequenceConfig:
        if self.context + 2 > self.length:
            raise ValueError(
                f"context is {self.context}, which leaves no token to predict in windows of length {self.length}; lower it"
            )
        return self


class PrecomputeConfig(Section):
    """Settings of the Ray Data job. `unit_rows` and `unit_bytes` decide which rows share a shard; they are part of a
    cache's fingerprint. Where layers are stored, which take many times what logits do, a shard holds fewer rows.
    `positions_per_batch` and `threads_per_actor` decide how floats are rounded, nothing else: with both the same, any
    number of actors gives identical shards."""

    actors: int | Literal["auto"] = Field(
        "auto",
        description="teacher actors, one model each; auto: one for each GPU of the cluster, or a single one on its CPUs",
    )
    gpus_per_actor: float | Literal["auto"] = Field(
        "auto",
        description="at most 1, a part of one for actors that share a GPU, 0 for the CPU; auto: 1 where the cluster has GPUs",
    )
    threads_per_actor: int | None = Field(
        None,
        ge=1,
        description="CPU threads of one actor; default: all cores, so set it for several on CPUs",
    )
    positions_per_batch: int = Field(2048, ge=1, description="tokens in one forward pass, padding included")
    unit_rows: int = Field(1024, ge=1, description="a work unit (= a shard) closes at so many rows")
    unit_bytes: int = Field(4 * 2**20, ge=1, description="... or at so many bytes of text")
    batch_seconds: float = Field(
        1800,
        gt=0,
        description="a forward pass that has not ended after so many seconds counts as hung: its process is ended, and the row "
        "that hangs goes to quarantine",
    )
    grow: bool = Field(
        False,
        description="where the cache is finished: add what it lacks, rows of the corpus and targets of layers; nothing else of "
        "the recipe may differ from how the cache was made",
    )
    address: str | None = Field(None, description="Ray cluster to join; default: RAY_ADDRESS, else a local one")

    @field_validator("actors", "gpus_per_actor", mode="before")
    @classmethod
    def _readable(cls, value: Any, info: ValidationInfo) -> Any:
        """In one line, where pydantic would print one for each type that the value is not."""
        number = float if info.field_name == "gpus_per_actor" else int
        if value == "auto" or (isinstance(value, (int, number)) and not isinstance(value, bool)):
            return value
        raise ValueError("must be a whole number, or auto" if number is int else "must be a number, or auto")

    @field_validator("actors")
    @classmethod
    def _at_least_one(cls, actors: int | str) -> int | str:
        if actors != "auto" and int(actors) < 1:
            raise ValueError("must be 1 or more, or auto")
        return actors

    @field_validator("gpus_per_actor")
    @classmethod
    def _one_gpu(cls, gpus: float | str) -> float | str:
        if gpus != "auto" and not 0 <= float(gpus) <= 1:
            raise ValueError(
                "must be from 0 to 1, or auto: a teacher runs on one GPU, so further ones would be reserved and idle; for more "
                "speed raise actors, for a model that is too large use one that is quantised or smaller"
            )
        return gpus
