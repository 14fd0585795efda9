"""Finds the special token that ends a turn of a conversation, on both sides.

A chat template may close turns by another token than EOS (`<|im_end|>` of many base models). What the teacher says where a turn
ends must be carried over to the token that the student is to write there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from teachercache.bounded import Unrenderable
from teachercache.corpus.chat import ChatRenderer
from teachercache.corpus.contents import contents_of
from teachercache.tokens.panics import panics_refused
from teachercache.tokens.vocabulary_map import VocabularyMap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MESSAGES = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]


def with_turn_ends(mapped: VocabularyMap, teacher: Any, student: Any) -> VocabularyMap:
    """The map with the teacher's end of a turn on the student's; as it is where either has none."""
    teacher_end, student_end = turn_end(teacher), turn_end(student)
    if teacher_end is None or student_end is None:
        return mapped
    first_Vt, exact_Vt = mapped.first_Vt.copy(), mapped.exact_Vt.copy()
    first_Vt[teacher_end], exact_Vt[teacher_end] = student_end, True
    emitted_Vs = np.zeros_like(mapped.emitted_Vs)
    emitted_Vs[first_Vt[first_Vt >= 0]] = True
    return replace(mapped, first_Vt=first_Vt, exact_Vt=exact_Vt, emitted_Vs=emitted_Vs)


@panics_refused()
def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that follows what an assistant said; None where none does."""
    renderer = ChatRenderer(tokenizer)
    try:
        text = renderer.render(MESSAGES).text
    except Unrenderable:
        return None
    replies = [content for content in contents_of(renderer, MESSAGES, text) if content.role == "assistant"]
    if not replies:
        return None
    ids = tokenizer(text[replies[-1].end :], add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in set(tokenizer.all_special_ids) else None
