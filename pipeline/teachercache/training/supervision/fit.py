"""Checks that a student fits a cache: everything that is refused before the first step, each in a line with its
remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from teachercache.cache import Cache, Manifest
from teachercache.cache.manifest.alignment_manifest import AlignmentManifest
from teachercache.config import StudentConfig
from teachercache.errors import CacheError, ModelError
from teachercache.models.loading import (
    find_model,
    load_config,
    takes_one_row,
    weights_identity,
)
from teachercache.models.probes import check_sight, isolates_packed_segments, most_tokens
from teachercache.training.initialise.partitioned import rows_of, runnable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from teachercache.training.supervision.contract import Supervision

REMEDY = "use a student of the teacher's family, e.g. one that `teachercache init-student` makes"


def check_cache(cache: Cache) -> None:
    """Raise `CacheError` when there is nothing to train on: no rows, or no logits."""
    cache.check_logits()
    if cache.rows_of("train") == 0:
        held_out = cache.rows_of("held-out")
        why = f"all of its {held_out} rows are held out" if held_out else "it is empty"
        raise CacheError(
            f"{cache.name} has no rows to train on: {why}; precompute it with more rows or a smaller corpus.held_out"
        )


@dataclass(eq=False)
class Fit:
    """Checks that a student can learn from all caches of a run; for the command and for `DistillationTrainer` from
    Python alike.

    A student whose flash kernel waits for a GPU cannot run before training wraps it: what only a forward pass shows is then
    checked at the first batch, by all processes at once.
    """

    supervision: Supervision
    pack: bool
    _ran: bool = False

    def check(self, model: PreTrainedModel) -> None:
        """Raise `ModelError` for a vocabulary or positions that are too few, nothing that is aligned, and, where the model can
        run, for what `check_wrapped` refuses; also where each process holds a part of it (ZeRO 3)."""
        self.supervision.check_student(_name_of(model))
        for number in range(len(self.supervision.caches)):
            check_shapes(model, self.supervision.tokens_of(number))
        if not (takes_one_row(model) and model.device.type == "cpu"):
            with runnable(model):
                self.check_wrapped(model, model)

    def check_wrapped(self, model: PreTrainedModel, student: PreTrainedModel) -> None:
        """Raise `ModelError` for a student that sees later tokens, or other documents of a packed row. It runs on a few tokens,
        once; `model` is `student` as training wraps it."""
        if self._ran:
            return
        name, manifests = _name_of(student), [cache.manifest for cache in self.supervision.caches]
        vocabulary_size = self.supervision.tokens_of(0).vocabulary_size
        check_sight(model, self.supervision.task, name=f"student {name}", vocabulary_size=vocabulary_size)
        packed = [manifest for manifest in manifests if manifest.layout == "packed"]
        check_packing(model, name, [*packed, *manifests][0], vocabulary_size=vocabulary_size, pack=self.pack)
        self._ran = True


def check_shapes(model: PreTrainedModel, tokens: Manifest | AlignmentManifest) -> None:
    """Raise `ModelError` when the student cannot read the tokens of a cache, or of its alignment, as far as its shapes tell."""
    name = _name_of(model)
    check_vocabulary(model, name, tokens)
    check_length(model, name, tokens)


def _name_of(model: PreTrainedModel) -> str:
    return getattr(model.config, "name_or_path", None) or type(model).__name__


def initial_weights(student: StudentConfig) -> dict[str, str | None]:
    """Returns what pins the weights that training begins with; loads none of them. Raises `ModelError` for no such
    model.

    The same in every process, so that all of them refuse another run's folder, and none waits for the others.
    """
    commit = None
    if not find_model(student.model).is_local:
        commit = getattr(load_config(student.model, revision=student.revision), "_commit_hash", None)
    return weights_identity(student.model, revision=student.revision, commit=commit)


def check_vocabulary(model: PreTrainedModel, name: str, manifest: Manifest | AlignmentManifest) -> None:
    """The student's embeddings must hold every token that it reads; more rows than that are padding and allowed."""
    parts = {"input embedding": model.get_input_embeddings(), "output embedding": model.get_output_embeddings()}
    for part, module in parts.items():
        if module is None:
            continue
        tokens = rows_of(module.weight)
        if tokens < manifest.vocabulary_size:
            raise ModelError(
                f"student {name}: its {part} has {tokens} tokens, {_whose(manifest)} tokenizer has "
                f"{manifest.vocabulary_size}; {REMEDY}"
            )


def _whose(manifest: Manifest | AlignmentManifest) -> str:
    return "the cache's" if isinstance(manifest, Manifest) else "its own"


def check_length(model: PreTrainedModel, name: str, manifest: Manifest | AlignmentManifest) -> None:
    """The student must have positions for the longest row."""
    longest = most_tokens(model)
    if longest is not None and longest < manifest.sequence_length:
        of_whom = " in its own tokens" if isinstance(manifest, AlignmentManifest) else ""
        shorter = "a shorter sequence.length" if of_whom else f"sequence.length={longest}"
        raise ModelError(
            f"student {name} takes at most {longest} tokens, rows of the cache have up to {manifest.sequence_length}{of_whom}; "
            f"use a student with more positions, or precompute with {shorter}"
        )


def check_packing(
    model: PreTrainedModel, name: str, manifest: Manifest, *, vocabulary_size: int, pack: bool = False
) -> None:
    """In packed rows a document must not see the one before it: the teacher's did not. `vocabulary_size` is of the tokens that
    the student reads."""
    if manifest.layout != "packed" and not pack:
        return
    if not isolates_packed_segments(model, vocabulary_size=vocabulary_size):
        remedy = (
            "so it cannot learn from this cache; use another student, or precompute with sequence.layout=documents"
            if manifest.layout == "packed"
            else "so train.pack would change what it learns; set train.pack: false"
        )
        raise ModelError(f"student {name} lets the documents of a packed row see each other, {remedy}")
