"""Through which alignment a model with a tokenizer of its own reads a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from teachercache.cache import Cache
from teachercache.cache.alignment import CacheAlignment
from teachercache.errors import CacheError
from teachercache.stream.tokenizers import teacher_tokenizer
from teachercache.tokens.carried_prefix import with_prefix
from teachercache.tokens.fingerprint import template_fingerprint, tokenizer_fingerprint
from teachercache.tokens.vocabulary_map import vocabulary_map

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def alignment_for(cache: Cache, tokenizer: PreTrainedTokenizerBase, *, student: str) -> CacheAlignment | None:
    """The alignment of a cache with this tokenizer, which messages call `student`; None where none is needed: it is the
    teacher's own, or has the same bytes at the same ids. It is found also where the alignment's begins rows as the cache's
    `sequence.prefix` says, and this one otherwise.

    Raises `CacheError` where the cache has no alignment with another tokenizer.
    """
    if tokenizer_fingerprint(tokenizer) == cache.manifest.tokenizer_fingerprint:
        return None
    chats = bool(cache.manifest.corpus.get("messages_field"))
    begun = with_prefix(tokenizer, cache.manifest.row_prefix, chats=chats)
    try:
        template = template_fingerprint(begun) if chats else None
        return CacheAlignment.open(cache, tokenizer_fingerprint(begun), student=student, chat_template=template)
    except CacheError:
        if vocabulary_map(teacher_tokenizer(cache), tokenizer).identical:
            return None
        raise
