"""How rows begin: the tokens that stand before a text where a model reads one.

The tokenizer says it. Its post-processor puts BOS (Llama, Gemma) or CLS (BERT) before a text, or nothing (GPT-2, Qwen,
SmolLM2); a chat template writes BOS by itself, or does without. Models that were trained with BOS in front lose much
without it: Gemma 3 270M 1.4 nats a token. So every row begins with it, windows from the middle of a document too, and no
row is to predict it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from teachercache.bounded import ChatTemplate, Unrenderable
from teachercache.config import RowPrefix
from teachercache.errors import RecipeError

_EXCHANGE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]


def row_prefix(tokenizer: Any, choice: RowPrefix = "auto", *, chats: bool) -> tuple[int, ...]:
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


def own_prefix(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer itself puts before a text."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    found = next((start for start in range(len(whole)) if whole[start : start + len(plain)] == plain), 0)
    return tuple(int(index) for index in whole[:found])


def template_prefix(tokenizer: Any) -> tuple[int, ...]:
    """BOS, where the chat template begins a conversation with it; () where it does not, or there is no template.

    ChatML's <|im_start|> is BOS to some tokenizers, but begins every turn: it begins the answer too, and says nothing about
    where a conversation begins. Where BOS is the end token as well (OLMo 2), it comes again at the end of the answer.
    """
    bos = tokenizer.bos_token_id
    if bos is None or not getattr(tokenizer, "chat_template", None):
        return ()
    whole, question = _rendered(tokenizer, _EXCHANGE), _rendered(tokenizer, _EXCHANGE[:1])
    if whole[:1] != [bos]:
        return ()
    answered = bool(question) and whole[: len(question)] == question
    of_turns = whole[len(question) : len(question) + 1] == [bos] if answered else whole.count(bos) > 1
    return () if of_turns else (int(bos),)


def _rendered(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """A conversation as the template writes it; empty where it refuses."""
    try:
        text = ChatTemplate(tokenizer).rendered(messages).text
    except Unrenderable:
        return []
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def begins_with(ids_S: Any, prefix: Sequence[int]) -> bool:
    """Whether some tokens begin with these."""
    return len(ids_S) >= len(prefix) and np.array_equal(np.asarray(ids_S)[: len(prefix)], np.asarray(prefix, np.int64))
