"""Checks that a student fits a cache: everything that is refused before the first step, each in a line with its
remedy."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teachercache.cache import Cache, Manifest
from teachercache.cache.alignment import CacheAlignment
from teachercache.cache.manifest.alignment_manifest import AlignmentManifest
from teachercache.config import StudentConfig
from teachercache.errors import CacheError, ModelError
from teachercache.models.loading import (
    find_model,
    load_config,
    load_tokenizer,
    save_tokenizer,
    takes_one_row,
    weights_identity,
)
from teachercache.models.probes import check_sight, isolates_packed_segments
from teachercache.stream.alignment import alignment_for
from teachercache.stream.tokenizers import student_tokenizer, teacher_tokenizer
from teachercache.tokens.carried_prefix import with_prefix
from teachercache.tokens.fingerprint import tokenizer_fingerprint, vocabulary_size
from teachercache.training.initialise.partitioned import rows_of, runnable

if TYPE_CHECKING:
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


def check_tokenizers(caches: Sequence[Cache], alignments: Sequence[CacheAlignment]) -> None:
    """Raise `CacheDamaged` where a tokenizer that lies in the caches is not the one that they were made with, before anything
    is learned: one of them is exported in the end."""
    for cache in caches:
        teacher_tokenizer(cache)
    for alignment in alignments:
        student_tokenizer(alignment)


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

    def check(self, model: Any) -> None:
        """Raise `ModelError` for a vocabulary or positions that are too few, nothing that is aligned, and, where the model can
        run, for what `check_wrapped` refuses; also where each process holds a part of it (ZeRO 3)."""
        self.supervision.check_student(_name_of(model))
        for number in range(len(self.supervision.caches)):
            check_shapes(model, self.supervision.tokens_of(number))
        if not (takes_one_row(model) and model.device.type == "cpu"):
            with runnable(model):
                self.check_wrapped(model, model)

    def check_wrapped(self, model: Any, student: Any) -> None:
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


def check_shapes(model: Any, tokens: Manifest | AlignmentManifest) -> None:
    """Raise `ModelError` when the student cannot read the tokens of a cache, or of its alignment, as far as its shapes tell."""
    name = _name_of(model)
    check_vocabulary(model, name, tokens)
    check_length(model, name, tokens)


def _name_of(model: Any) -> str:
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


def check_vocabulary(model: Any, name: str, manifest: Manifest | AlignmentManifest) -> None:
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


def check_length(model: Any, name: str, manifest: Manifest | AlignmentManifest) -> None:
    """The student must have positions for the longest row."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and longest < manifest.sequence_length:
        of_whom = " in its own tokens" if isinstance(manifest, AlignmentManifest) else ""
        shorter = "a shorter sequence.length" if of_whom else f"sequence.length={longest}"
        raise ModelError(
            f"student {name} takes at most {longest} tokens, rows of the cache have up to {manifest.sequence_length}{of_whom}; "
            f"use a student with more positions, or precompute with {shorter}"
        )


def check_packing(model: Any, name: str, manifest: Manifest, *, vocabulary_size: int, pack: bool = False) -> None:
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


def alignments_of(student: StudentConfig, caches: Sequence[Cache]) -> list[CacheAlignment]:
    """The alignments, one a cache, through which a student with another tokenizer learns; none where it has the teacher's, or
    one with the same bytes at the same ids, or none at all.

    Raises `CacheError` where a cache has no alignment with the student's tokenizer.
    """
    tokenizer = _tokenizer_of(student)
    if tokenizer is None:
        return []
    alignments = [alignment_for(cache, tokenizer, student=student.model) for cache in caches]
    # Caches of one run have one tokenizer: where one can be read as it is, all can, also those with an alignment.
    return [] if None in alignments else [alignment for alignment in alignments if alignment is not None]


@contextmanager
def tokenizer_to_export(student: StudentConfig, cache: Cache, alignments: Sequence[CacheAlignment]) -> Iterator[Path]:
    """A folder with the tokenizer files of the student that leaves a run: those that made its rows.

    They are the teacher's, with its chat template and end token, also where the student has the same tokens and ends
    otherwise, as base models do. One that has further tokens keeps its own, with the teacher's template and end; one that
    learned through an alignment keeps its own, whose template its rows were rendered with. All begin as its rows did, where
    the recipe chose that (`sequence.prefix`).
    """
    tokenizer = None if alignments else _tokenizer_of(student)
    wider = tokenizer is not None and vocabulary_size(tokenizer) > cache.manifest.vocabulary_size
    if alignments or (cache.manifest.row_prefix == "auto" and not wider):
        with alignments[0].tokenizer_folder() if alignments else cache.teacher_folder() as files:
            yield files
        return
    exported = teacher = teacher_tokenizer(cache)
    if tokenizer is not None and wider:
        exported = tokenizer
        exported.eos_token = teacher.eos_token or tokenizer.eos_token
        exported.chat_template = teacher.chat_template or tokenizer.chat_template
    chats = bool(cache.manifest.corpus.get("messages_field"))
    exported = with_prefix(exported, cache.manifest.row_prefix, chats=chats)
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder), exported, fingerprint=tokenizer_fingerprint(exported))
        yield Path(folder)


def _tokenizer_of(student: StudentConfig) -> Any | None:
    """The tokenizer that lies beside the student; there need not be one."""
    folder = Path(student.model).expanduser()
    if folder.is_dir() and not any(folder.glob("tokenizer*")):
        return None
    try:
        return load_tokenizer(student.model, revision=student.revision)
    except ModelError:
        if folder.is_dir():
            raise
        return None  # a hub model without a tokenizer
