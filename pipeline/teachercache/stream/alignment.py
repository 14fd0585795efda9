"""Through which alignment a model with a tokenizer of its own reads a cache."""

from __future__ import annotations

from typing import Any

from teachercache.cache import Cache
from teachercache.cache.alignment import Sidecar
from teachercache.errors import CacheError
from teachercache.stream.tokenizers import teacher_tokenizer
from teachercache.tokens.fingerprint import template_fingerprint, tokenizer_fingerprint
from teachercache.tokens.vocabulary_map import vocabulary_map


def alignment_for(cache: Cache, tokenizer: Any, *, student: str) -> Sidecar | None:
    """The alignment of a cache with this tokenizer, which messages call `student`; None where none is needed: it is the
    teacher's own, or has the same bytes at the same ids.

    Raises `CacheError` where the cache has no alignment with another tokenizer.
    """
    fingerprint = tokenizer_fingerprint(tokenizer)
    if fingerprint == cache.manifest.tokenizer_fingerprint:
        return None
    try:
        template = template_fingerprint(tokenizer) if cache.manifest.corpus.get("messages_field") else None
        return Sidecar.open(cache, fingerprint, student=student, chat_template=template)
    except CacheError:
        if vocabulary_map(teacher_tokenizer(cache), tokenizer).identical:
            return None
        raise
