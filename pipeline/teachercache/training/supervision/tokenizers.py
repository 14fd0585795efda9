"""Tokenizers of a run: which one the student has, the alignments that it learns through, and the files that leave with it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from teachercache.cache import Cache
from teachercache.cache.alignment import CacheAlignment
from teachercache.config import StudentConfig
from teachercache.errors import ModelError
from teachercache.models.loading import load_tokenizer, save_tokenizer
from teachercache.stream.alignment import alignment_for
from teachercache.stream.tokenizers import teacher_tokenizer
from teachercache.tokens.carried_prefix import with_prefix
from teachercache.tokens.fingerprint import tokenizer_fingerprint, vocabulary_size


def alignments_of(student: StudentConfig, caches: Sequence[Cache]) -> list[CacheAlignment]:
    """The alignments, one a cache, through which a student with another tokenizer learns; none where it has the teacher's, or
    one with the same bytes at the same ids, or none at all.

    Raises `CacheError` where a cache has no alignment with the student's tokenizer.
    """
    tokenizer = tokenizer_beside(student)
    if tokenizer is None:
        return []
    alignments = [alignment_for(cache, tokenizer, student=student.model) for cache in caches]
    # Caches of one run have one tokenizer: where one can be read as it is, all can, also those with an alignment.
    return [] if None in alignments else [alignment for alignment in alignments if alignment is not None]


@contextmanager
def teachers_tokenizer(student: StudentConfig, cache: Cache) -> Iterator[Path]:
    """A folder with the tokenizer files of a student that leaves a run and reads the teacher's tokens: those that made
    its rows.

    They are the teacher's, with its chat template and end token, also where the student has the same tokens and ends
    otherwise, as base models do. One that has further tokens keeps its own, with the teacher's template and end. All begin as
    its rows did, where the recipe chose that (`sequence.prefix`).
    """
    tokenizer = tokenizer_beside(student)
    wider = tokenizer is not None and vocabulary_size(tokenizer) > cache.manifest.vocabulary_size
    if cache.manifest.row_prefix == "auto" and not wider:
        with cache.teacher_folder() as files:
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


def tokenizer_beside(student: StudentConfig) -> Any | None:
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
