"""A tokenizer that begins texts, or conversations, as the `sequence.prefix` of a recipe says.

What a student reads where it is used must begin as its rows did. A choice other than the tokenizer's own is carried into it:
into its post-processor where rows are texts, into its chat template where they are conversations.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from teachercache.config import RowPrefix
from teachercache.errors import RecipeError
from teachercache.tokens.prefix import begins_conversations, own_prefix, row_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def readers_prefix(tokenizer: PreTrainedTokenizerBase, choice: RowPrefix, *, chats: bool) -> tuple[int, ...]:
    """Returns the beginning of a student's rows where the teacher's rows begin as `choice` says: the same one in the
    student's tokens; without such a token, the one that its tokenizer puts in front by itself."""
    try:
        return row_prefix(tokenizer, choice, chats=chats)
    except RecipeError:
        return row_prefix(tokenizer, chats=chats)


def with_prefix(tokenizer: PreTrainedTokenizerBase, choice: RowPrefix, *, chats: bool) -> Any:
    """The tokenizer itself, or a changed copy where it begins rows otherwise than `readers_prefix` says."""
    wanted = readers_prefix(tokenizer, choice, chats=chats)
    if choice == "auto" or (begins_conversations(tokenizer, wanted) if chats else own_prefix(tokenizer) == wanted):
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    if chats:
        _begin_conversations(changed, wanted)
    else:
        _begin_texts(changed, wanted)
    return changed


def _begin_conversations(tokenizer: PreTrainedTokenizerBase, wanted: Sequence[int]) -> None:
    """Put tokens before what the chat template writes, as rows have them."""
    before = f"{{{{ {json.dumps(''.join(tokenizer.convert_ids_to_tokens(list(wanted))), ensure_ascii=False)} }}}}"
    template = tokenizer.chat_template
    named = isinstance(template, dict)
    tokenizer.chat_template = (
        {name: before + source for name, source in template.items()} if named else before + template
    )


def _begin_texts(tokenizer: PreTrainedTokenizerBase, wanted: Sequence[int]) -> None:
    """Have the post-processor put tokens before a text; behind it those that it did."""
    from tokenizers import processors

    plain, whole = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    behind = whole[len(own_prefix(tokenizer)) + len(plain) :]
    before, after = (tokenizer.convert_ids_to_tokens(list(ids)) for ids in (wanted, behind))
    second = [f"{token}:1" for token in (*before, "$B", *after)]
    around = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *second],
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in dict.fromkeys([*before, *after])],
    )
    backend = tokenizer.backend_tokenizer
    processor = json.loads(backend.to_str())["post_processor"] or {}
    kept = [
        processors.ByteLevel(trim_offsets=part["trim_offsets"], add_prefix_space=part["add_prefix_space"])
        for part in processor.get("processors", [processor])
        if "trim_offsets" in part
    ]
    backend.post_processor = processors.Sequence([*kept, around]) if kept else around
