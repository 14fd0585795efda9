"""Caches of earlier versions, whose rows do not all begin as their tokenizer has it: a line for whoever reads one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from teachercache.cache import Cache
from teachercache.cache.alignment import CacheAlignment
from teachercache.stream.tokenizers import student_tokenizer, teacher_tokenizer
from teachercache.tokens.prefix import row_prefix


def warnings_of(caches: Sequence[Cache]) -> list[str]:
    """One line for each cache that an earlier version made and whose tokenizer puts something before a text: only the
    beginnings of documents have it there."""
    lines = []
    for cache in caches:
        tokens = _unsaid(cache.manifest.tokenizer, cache, partial(teacher_tokenizer, cache))
        if tokens:
            lines.append(
                f"warning: {cache.name} was made by an earlier version: its tokenizer puts {tokens} before a text, and only "
                "the first rows of documents begin with it, so that what the teacher says in the others may be far from what "
                "it can; precompute it again"
            )
    return lines


def warnings_of_alignments(caches: Sequence[Cache], alignments: Sequence[CacheAlignment]) -> list[str]:
    """The same of the caches' alignments, one each."""
    lines = []
    for cache, alignment in zip(caches, alignments, strict=True):
        tokens = _unsaid(alignment.manifest.tokenizer, cache, partial(student_tokenizer, alignment))
        if tokens:
            lines.append(
                f"warning: the alignment of {cache.name} with {alignment.manifest.tokenizer['name']} was made by an earlier "
                f"version: {tokens} stands only where documents begin; delete {alignment.manifest.folder} and align again"
            )
    return lines


def _unsaid(described: dict[str, Any], cache: Cache, load: Callable[[], Any]) -> str:
    """Returns what a tokenizer puts before a text where the manifest says nothing of it; "" if nothing."""
    if "prefix_ids" in described:
        return ""
    tokenizer = load()
    prefix = row_prefix(tokenizer, chats=bool(cache.manifest.corpus.get("messages_field")))
    return " ".join(map(str, tokenizer.convert_ids_to_tokens(list(prefix))))
