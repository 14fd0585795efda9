"""Chooses the documents of a corpus that a student goes on from, and how much of each it is given."""

from __future__ import annotations

import hashlib
import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from teachercache.bounded import ChatTemplate, Unrenderable
from teachercache.config import CorpusConfig, RowPrefix
from teachercache.corpus.documents import Document, documents
from teachercache.corpus.readers import read_rows
from teachercache.errors import CorpusError
from teachercache.tokens.carried_prefix import readers_prefix
from teachercache.tokens.prefix import begins_with

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """Token ids that the student goes on from, and the conversation that they are, if they are one."""

    ids: list[int]
    messages: list[dict[str, Any]] | None = None


def prompts(
    config: CorpusConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: int,
    prompt_tokens: int,
    seed: int,
    prefix: RowPrefix = "auto",
) -> list[Prompt]:
    """At most `rows` of them, longest first. A text is given up to its first `prompt_tokens` tokens, at most half of it; a
    conversation up to its last assistant turn, if that takes no more tokens. They begin as the rows of a cache do
    (`sequence.prefix`).

    Raises `CorpusError` where the corpus has nothing to go on from.
    """
    if config.messages_field and tokenizer.chat_template is None:
        raise CorpusError(
            f"corpus {config.source} has conversations, and the student's tokenizer has no chat template; take a chat model, "
            "or text rows (corpus.text_field)"
        )
    usable = (document for document in documents(read_rows(config), config) if isinstance(document, Document))
    trained = (document for document in usable if document.problem is None and not document.held_out)
    drawn = heapq.nsmallest(rows, trained, key=lambda document: _draw(document, seed))
    before = list(readers_prefix(tokenizer, prefix, chats=bool(config.messages_field)))
    candidates = [_of(document, tokenizer, prompt_tokens, before) for document in drawn]
    prompts = [prompt for prompt in candidates if prompt is not None]
    if not prompts:
        raise CorpusError(
            f"corpus {config.source} has no document that a student could go on from within {prompt_tokens} tokens; raise "
            "--prompt-tokens"
        )
    return sorted(prompts, key=lambda prompt: -len(prompt.ids))


def _draw(document: Document, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed} {document.source_id}".encode(), digest_size=16).digest()


def _of(document: Document, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int, before: list[int]) -> Prompt | None:
    if document.messages is None:
        ids = [*before, *tokenizer(document.text, add_special_tokens=False)["input_ids"]]
        prompt_ids = ids[: min(prompt_tokens, max(1, len(ids) // 2))]
        return Prompt(prompt_ids) if prompt_ids else None
    last = max((n for n, message in enumerate(document.messages) if message["role"] == "assistant"), default=0)
    if not last:
        return None
    messages = document.messages[:last]
    try:
        text = ChatTemplate(tokenizer).rendered(messages, prompt=True).text
    except Unrenderable:
        return None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = list(ids) if begins_with(ids, before) else [*before, *ids]
    return Prompt(ids, messages) if len(ids) <= prompt_tokens else None
