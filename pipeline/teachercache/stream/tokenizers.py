"""Tokenizers that lie in caches: loaded from bytes that were checked, and the ones that the manifest means.

A tokenizer decides what every stored id stands for: with another one, a student learns other text and says nothing. So its
files are held against their digests, and what was loaded from them against the manifest's fingerprint.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from teachercache.bounded.tokenizers import try_tokenizer
from teachercache.cache import Cache
from teachercache.cache.alignment import CacheAlignment
from teachercache.errors import CacheDamaged, ModelError
from teachercache.models.loading import load_tokenizer
from teachercache.tokens.claims import DESCRIPTION, check_tokenizer_files
from teachercache.tokens.fingerprint import read_fingerprint, saved_fingerprint, tokenizer_fingerprint


def teacher_tokenizer(cache: Cache) -> Any:
    """The teacher's. Raises `CacheDamaged` where its files are none, or give another tokenizer than the manifest's."""
    return _loaded(cache.teacher_folder(), cache.manifest.tokenizer, name=f"{cache.name}: the teacher's")


def student_tokenizer(alignment: CacheAlignment) -> Any:
    """The student's, of an alignment; raises as `teacher_tokenizer` does."""
    return _loaded(alignment.tokenizer_folder(), alignment.manifest.tokenizer, name=f"{alignment.manifest.folder}: the")


def _loaded(folder: AbstractContextManager[Path], described: Mapping[str, Any], *, name: str) -> Any:
    try:
        with folder as path:
            check_tokenizer_files(path, vocabulary_size=described["vocabulary_size"])
            try_tokenizer((path / DESCRIPTION).read_bytes())
            tokenizer = load_tokenizer(str(path))
            fingerprint = tokenizer_fingerprint(tokenizer)
            if fingerprint != described["fingerprint"]:
                # A later library may describe in another form what it read; that a class changes it is another matter.
                if fingerprint != read_fingerprint(path):
                    raise ValueError("their configuration makes another tokenizer than their description")
                fingerprint = saved_fingerprint(path)
    except (ModelError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CacheDamaged(f"{name} tokenizer files cannot be trusted: {reason}; fetch the cache again") from None
    if fingerprint != described["fingerprint"]:
        raise CacheDamaged(
            f"{name} tokenizer files give another tokenizer than the manifest says (fingerprint {fingerprint[:12]}, not "
            f"{described['fingerprint'][:12]}); fetch the cache again"
        )
    return tokenizer
