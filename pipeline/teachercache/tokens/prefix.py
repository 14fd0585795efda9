"""Row prefixes: the tokens that stand before a text where a model reads one.

The tokenizer says it. Its post-processor puts BOS (Llama, Gemma) or CLS (BERT) before a text, or nothing (GPT-2, Qwen,
SmolLM2); a chat template writes BOS or more by itself, or does without. Models that were trained with BOS in front lose much
without it: Gemma 3 270M 1.4 nats a token. So every row begins with it, windows from the middle of a document too, and no
row is to predict it.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from teachercache.bounded import ChatTemplate, Unrenderable
from teachercache.config import RowPrefix
from teachercache.errors import ModelError, RecipeError
from teachercache.tokens.panics import panics_refused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRIED = 4096  # tokens, for one that a text has
_EXCHANGE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]


def row_prefix(tokenizer: PreTrainedTokenizerBase, choice: RowPrefix = "auto", *, chats: bool) -> tuple[int, ...]:
    """The ids that a recipe's `sequence.prefix` means; `chats`: of conversations, which a chat template writes.

    Raises `RecipeError` for a token that the tokenizer does not have.
    """
    if choice == "none":
        return ()
    if choice == "auto":
        return template_prefix(tokenizer) if chats else own_prefix(tokenizer)
    index = tokenizer.bos_token_id if choice == "bos" else tokenizer.eos_token_id
    if index is None:
        name = "beginning" if choice == "bos" else "end"
        raise RecipeError(
            f"sequence.prefix is {choice}, and the tokenizer has no {name}-of-sequence token; set it to auto or none"
        )
    return (int(index),)


@panics_refused()
def own_prefix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Returns the tokens that the tokenizer itself puts before a text. Raises `ModelError` where no text has a token."""
    text, plain = next(((text, ids) for text in _texts(tokenizer) if (ids := _plain(tokenizer, text))), ("", []))
    if not plain:
        raise ModelError(
            "the tokenizer has no token for any text that was tried, so nobody can tell what it puts before one; "
            "use a tokenizer that reads text"
        )
    whole = list(map(int, tokenizer(text)["input_ids"]))
    starts = (start for start in range(len(whole)) if whole[start : start + len(plain)] == plain)
    if (start := next(starts, None)) is not None:
        return tuple(whole[:start])
    return tuple(takewhile(special_ids(tokenizer).__contains__, whole))


def _texts(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yields short texts, the first ones of which most tokenizers have; then what the vocabulary's first tokens stand
    for: one of genes or of notes has no letter `a`."""
    yield from "aA1"
    special = special_ids(tokenizer)
    for index in range(min(len(tokenizer), TRIED)):
        if index not in special:
            yield str(tokenizer.decode([index]))


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(map(int, tokenizer(text, add_special_tokens=False)["input_ids"]))


def template_prefix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The special tokens that the chat template begins a conversation with, and its turns not: BOS, or several (GLM's
    [gMASK]<sop>); () where there are none, or no template.

    They are what the first question has in front and a later one has not. Where more stands between them (the system's turn
    that many templates write by themselves), they are the special tokens in front of it, without the last one, which is the
    mark of that turn, unless it is BOS (also where every question has it, as Llama 2's).
    """
    if not getattr(tokenizer, "chat_template", None):
        return ()
    question, answered, again = _rendered(tokenizer, [_EXCHANGE[:1], _EXCHANGE, [*_EXCHANGE, _EXCHANGE[0]]])
    special = special_ids(tokenizer)
    later = again[len(answered) :] if answered and again[: len(answered)] == answered else []
    before = question[: -len(later)] if later and question[-len(later) :] == later else []
    if before and special.issuperset(before):
        return tuple(before)
    run = list(takewhile(special.__contains__, answered))
    if run[-1:] != [tokenizer.bos_token_id]:
        run = run[:-1]
    return tuple(takewhile(lambda index: not _is_of_turns(index, question, answered, special), run))


def begins_conversations(tokenizer: PreTrainedTokenizerBase, prefix: Sequence[int]) -> bool:
    """Tells whether the chat template's output begins with `prefix`; True where it refuses, or there is none: then
    nothing can be changed."""
    if not prefix or not getattr(tokenizer, "chat_template", None):
        return True
    [answered] = _rendered(tokenizer, [_EXCHANGE])
    return not answered or begins_with(answered, prefix)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns the ids of all tokens that are no text."""
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    return {index for index, token in added.items() if token.special} | set(tokenizer.all_special_ids)


def _is_of_turns(index: int, question: Sequence[int], answered: Sequence[int], special: Container[int]) -> bool:
    """Tells whether a special token begins the answer too. ChatML's <|im_start|> is BOS to some tokenizers, but says
    nothing about the beginning of a conversation. A BOS that is the end token as well (OLMo 2) comes again at the end
    of the answer alone."""
    if not question or answered[: len(question)] != question:
        return answered.count(index) > 1
    return index in takewhile(special.__contains__, answered[len(question) :])


@panics_refused()
def _rendered(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[dict[str, str]]]) -> list[list[int]]:
    """Conversations as the template writes them; empty where it refuses."""
    renderings = ChatTemplate(tokenizer).rendered_all([(conversation, False) for conversation in conversations])
    texts = ["" if isinstance(rendering, Unrenderable) else rendering.text for rendering in renderings]
    return [list(map(int, tokenizer(text, add_special_tokens=False)["input_ids"])) for text in texts]


def begins_with(ids_S: Any, prefix: Sequence[int]) -> bool:
    """Tells whether `ids_S` begin with `prefix`."""
    return len(ids_S) >= len(prefix) and np.array_equal(np.asarray(ids_S)[: len(prefix)], np.asarray(prefix, np.int64))
