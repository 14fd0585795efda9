"""Finds the messages of a conversation in its rendered text, so that another chat template can be applied later.

A template is asked with one message at a time replaced by a placeholder: what stands before and after the placeholder must
be what the text begins and ends with, and what is between them what was said, white space at its ends aside. So a content is
found by its place, not by what it looks like. One that the template changes, leaves out, repeats or treats by what it says
is left out, never guessed at; of a reply with reasoning that the template lays out by itself, or drops, the answer is
found."""

from __future__ import annotations

from collections.abc import Sequence

from teachercache.corpus.chat import THOUGHT, ChatRenderer, Message, Span, mark, said, with_mark
from teachercache.tokens.rows import Content


def contents_of(renderer: ChatRenderer, messages: Sequence[Message], text: str) -> list[Content]:
    """Contents in `text`, which the renderer made of the messages, by their places in characters: disjoint and ascending.

    Costs a rendering of the conversation, where the template treats no message by what it says; else one for each message.
    """
    together = found_together(renderer, messages, text)
    if together is not None:
        return together
    contents = []
    for index, message in enumerate(messages):
        span = span_of(renderer, messages, index, text) if said(message).strip() else None
        if span is not None:
            contents.append(Content(str(message["role"]), *span))
    contents.sort(key=lambda content: content.start)  # some templates move what the system says
    disjoint: list[Content] = []
    for content in contents:
        if not disjoint or content.start >= disjoint[-1].end:
            disjoint.append(content)
    return disjoint


def found_together(renderer: ChatRenderer, messages: Sequence[Message], text: str) -> list[Content] | None:
    """With placeholders for all messages at once; None unless they stand once each and in order, and what is between them is
    what was said, to the end of the text."""
    spoken = [index for index, message in enumerate(messages) if said(message).strip()]
    if any(THOUGHT in said(messages[index]) for index in spoken):
        return None
    placed = list(messages)
    for index in spoken:
        placed[index] = with_mark(messages[index], index, keep_reasoning=False)
    rest = renderer.text_if_any(placed) or ""
    pieces: list[str] = []
    for index in spoken:
        before, mark_found, rest = rest.partition(mark(index))
        if not mark_found or mark(index) in rest:
            return None
        pieces.append(before)
    if not spoken or not text.startswith(pieces[0]):
        return None
    cursor, contents = len(pieces[0]), []
    for index, after in zip(spoken, [*pieces[1:], rest], strict=True):
        whole = said(messages[index])
        forms = (form for form in (whole, whole.strip()) if text.startswith(form + after, cursor))
        form = next(forms, None)
        if form is None:
            return None
        start = cursor + len(form) - len(form.lstrip())
        contents.append(Content(str(messages[index]["role"]), start, start + len(form.strip())))
        cursor += len(form) + len(after)
    return contents if cursor == len(text) else None


def span_of(renderer: ChatRenderer, messages: Sequence[Message], index: int, text: str) -> Span | None:
    """Returns the span of message `index`'s answer in the rendered `text`; None where its template does not show it."""
    whole = said(messages[index]).strip()
    answer = whole.rpartition(THOUGHT)[2].strip()
    for keep_reasoning in (False, True) if THOUGHT in whole else (False,):
        placed = with_mark(messages[index], index, keep_reasoning=keep_reasoning)
        skeleton = renderer.text_if_any([*messages[:index], placed, *messages[index + 1 :]]) or ""
        before, marker, after = skeleton.partition(mark(index))
        end = len(text) - len(after)
        if not marker or mark(index) in after or not (text.startswith(before) and text.endswith(after)):
            continue
        between = text[len(before) : end]  # "" where before and after overlap
        content = between.strip()
        if content and content in (answer, whole):
            start = len(before) + between.index(content)
            return start, start + len(content)
    return None
