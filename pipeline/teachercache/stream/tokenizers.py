"""Tokenizers that lie in caches: loaded from bytes that were checked, and the ones that the manifest means.

A tokenizer decides what every stored id stands for: with another one, a student learns other text and says nothing. So its
files are held against their digests, and what was loaded from them against the manifest's fingerprint.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from teachercache.errors import CacheDamaged, ModelError
from teachercache.models import load_tokenizer
from teachercache.shards import Cache
from teachercache.shards.sidecar import Sidecar
from teachercache.tokens.fingerprint import tokenizer_fingerprint


def teacher_tokenizer(cache: Cache) -> Any:
    """The teacher's. Raises `CacheDamaged` where its files are none, or give another tokenizer than the manifest's."""
    return _loaded(
        cache.teacher_folder(), name=f"{cache.name}: the teacher's", expected=cache.manifest.tokenizer_fingerprint
    )


def student_tokenizer(sidecar: Sidecar) -> Any:
    """The student's, of an alignment; raises as `teacher_tokenizer` does."""
    manifest = sidecar.manifest
    return _loaded(
        sidecar.tokenizer_folder(), name=f"{manifest.folder}: the", expected=manifest.tokenizer["fingerprint"]
    )


def _loaded(folder: AbstractContextManager[Path], *, name: str, expected: str) -> Any:
    try:
        with folder as path:
            tokenizer = load_tokenizer(str(path))
        found = tokenizer_fingerprint(tokenizer)
    except ModelError as error:
        raise CacheDamaged(f"{name} tokenizer files are none ({error}); fetch the cache again") from None
    if found != expected:
        raise CacheDamaged(
            f"{name} tokenizer files give another tokenizer than the manifest says (fingerprint {found[:12]}, not "
            f"{expected[:12]}); fetch the cache again"
        )
    return tokenizer
