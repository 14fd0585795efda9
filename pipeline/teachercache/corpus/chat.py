"""Conversations as text, with the character spans that the assistant wrote.

A span runs from the first character that the model would generate to the end of its turn: the end-of-turn marker is
part of it, white space that a template puts after the marker is not. Three ways to find them, surest first:

1. the template says so (`{% generation %}`);
2. prefixes: the conversation up to a turn, with and without the turn, renders to prefixes of the whole;
3. skeleton: the conversation rendered with placeholders for what the assistant said shows the text around it, for
   templates that strip earlier reasoning, treat the last turn differently, or ignore `add_generation_prompt`.

A conversation for which none of them agrees with the rendered text is refused (`Unrenderable`), never guessed at.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, NamedTuple

from teachercache.bounded import ChatTemplate, Text, Unrenderable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Span = tuple[int, int]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers recognises it
THOUGHT = "</think>"
MOST_PARTS = 2**22  # characters of a conversation's parts that are asked for at once, or those of one turn


class Rendered(NamedTuple):
    """A conversation as the model reads it; `assistant_spans` are character spans, ascending and disjoint."""

    text: str
    assistant_spans: list[Span]


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template. Raises `ModelError` if it has none, or a broken one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._template = ChatTemplate(tokenizer)

    def render(self, messages: Sequence[Message]) -> Rendered:
        """The text of a conversation and its assistant spans.

        Raises `Unrenderable`. A conversation without assistant turns has no spans.
        """
        turns = [] if _GENERATION.search(self._template.template) else _assistant_turns(messages)
        first = self._template.rendered_all([(messages, False), *_parts_of(messages, turns[:1])])
        text, spans = _found(first[0])
        if turns:
            by_prefix = self._prefix_spans(messages, text, turns, first[1:])
            spans = self._skeleton_spans(messages, text) if by_prefix is None else by_prefix
        spans = [(start, end) for start, end in spans if start < end]
        _check_complete(messages, [text[start:end] for start, end in spans])
        return Rendered(text, spans)

    def _text(self, messages: Sequence[Message]) -> str:
        return self._template.rendered(messages).text

    def text_if_any(self, messages: Sequence[Message]) -> str | None:
        """The text of a part of a conversation; templates may refuse parts of what they render whole."""
        try:
            return self._text(messages)
        except Unrenderable:
            return None

    def _prompt(self, messages: Sequence[Message]) -> str | None:
        """The text before a reply to these messages, or None when the template cannot say."""
        return _prompt_of(messages, *self._template.rendered_all([(messages, True), (messages, False)]))

    def _prefix_spans(
        self, messages: Sequence[Message], text: str, turns: Sequence[int], first: Sequence[Text | Unrenderable]
    ) -> list[Span] | None:
        """By the texts around each turn; `first` are those of the first one, for templates that already part there."""
        spans = _spans_around(messages, text, turns[:1], first)
        if spans is None or len(turns) == 1:
            return spans
        # The parts of many turns are many times the conversation: so many at a time as are of bounded size together.
        step = max(1, MOST_PARTS // (3 * max(1, len(text))))
        for first_turn in range(1, len(turns), step):
            chosen = turns[first_turn : first_turn + step]
            others = _spans_around(messages, text, chosen, self._template.rendered_all(_parts_of(messages, chosen)))
            if others is None:
                return None
            spans += others
        return spans

    def _skeleton_spans(self, messages: Sequence[Message], text: str) -> list[Span]:
        try:
            return self._match(messages, text, keep_reasoning=False)
        except Unrenderable:  # the template may lay out reasoning by its markers
            return self._match(messages, text, keep_reasoning=True)

    def _match(self, messages: Sequence[Message], text: str, *, keep_reasoning: bool) -> list[Span]:
        turns = _assistant_turns(messages)
        marked = [
            with_mark(message, number, keep_reasoning=keep_reasoning) if number in turns else message
            for number, message in enumerate(messages)
        ]
        pieces = _split_at([mark(index) for index in turns], self._text(marked))
        if not text.startswith(pieces[0]):
            raise Unrenderable("the chat template does not show where the assistant speaks")
        spans: list[Span] = []
        cursor = len(pieces[0])
        for number, index in enumerate(turns):
            after = pieces[number + 1]
            end = _end_of_content(text, cursor, said(messages[index]), after, last=number == len(turns) - 1)
            marker = self._end_of_turn(marked[: index + 1], index, after)
            start = self._start_of_turn(messages[:index], text, spans[-1][1] if spans else 0, cursor)
            spans.append((start, end + len(marker)))
            cursor = end + len(after)
        return spans

    def _start_of_turn(self, before: Sequence[Message], text: str, earliest: int, content: int) -> int:
        """Returns where generation begins: after the prompt when the whole conversation begins with it, else at the
        content."""
        prompt = self._prompt(before)
        known = prompt is not None and text.startswith(prompt) and earliest <= len(prompt) <= content
        return len(prompt) if known and prompt is not None else content

    def _end_of_turn(self, marked: Sequence[Message], index: int, after: str) -> str:
        """Returns the text that closes the turn: what follows it were it the last one, as far as the conversation has
        it there."""
        closing = (self.text_if_any(marked) or "").partition(mark(index))[2]
        marker = commonprefix([closing, after])  # noqa: RUF071 - of characters, as is meant
        if marker != closing:  # they part inside a special token, which then is no part of either
            marker = re.sub(r"[<\[][^>\]]*$", "", marker)
        return marker.rstrip() or marker


def _found(text: Text | Unrenderable) -> Text:
    if isinstance(text, Unrenderable):
        raise text
    return text


def _parts_of(messages: Sequence[Message], turns: Sequence[int]) -> list[tuple[Sequence[Message], bool]]:
    """Lists the conversations to render to find each of these turns: the prompt before it, the conversation before it
    and with it."""
    return [
        part
        for index in turns
        for part in ((messages[:index], True), (messages[:index], False), (messages[: index + 1], False))
    ]


def _prompt_of(messages: Sequence[Message], prompt: Text | Unrenderable, before: Text | Unrenderable) -> str | None:
    """The text before a reply, or None when the template cannot say."""
    if isinstance(prompt, Unrenderable) or not messages:
        return None
    # a template without support for it renders the same, which says nothing about where a reply begins
    same = isinstance(before, Text) and before.text == prompt.text
    return None if same else prompt.text


def _spans_around(
    messages: Sequence[Message], text: str, turns: Sequence[int], parts: Sequence[Text | Unrenderable]
) -> list[Span] | None:
    """The spans of turns, `parts` being those of `_parts_of`; None where these are no prefixes of the text."""
    spans = []
    for number, index in enumerate(turns):
        asked, before, whole = parts[3 * number : 3 * number + 3]
        prompt = _prompt_of(messages[:index], asked, before)
        if prompt is None or isinstance(whole, Unrenderable):
            return None
        through = whole.text
        if not through.startswith(prompt) or not text.startswith(through):
            return None
        turn = through[len(prompt) :]
        spans.append((len(prompt), len(through) - _padding(turn, said(messages[index]))))
    return spans


def said(message: Message) -> str:
    """The text of a message's content, be it a string, absent, or a list of parts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content if isinstance(part, dict))


def _assistant_turns(messages: Sequence[Message]) -> list[int]:
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def _check_complete(messages: Sequence[Message], pieces: Sequence[str]) -> None:
    """Refuse a text that lacks what the assistant said: some templates pass over content that is no list of parts."""
    spoken = "".join("".join(pieces).split())
    for index in _assistant_turns(messages):
        answer = "".join(said(messages[index]).rpartition(THOUGHT)[2].split())  # white space is the template's affair
        if answer not in spoken:
            raise Unrenderable("the chat template changes or leaves out what the assistant said")


def _padding(turn: str, content: str) -> int:
    """Characters of white space after the end-of-turn marker; 0 when the white space is the marker."""
    content = content.strip()
    marker = turn.partition(content)[2] if content and content in turn else turn
    return len(marker) - len(marker.rstrip()) if marker.strip() else 0


def mark(index: int) -> str:
    """The placeholder of a message."""
    return f"\ue000{index}\ue001"  # private-use characters: no text that models read holds them


def with_mark(message: Message, index: int, *, keep_reasoning: bool) -> Message:
    """The message with a placeholder for what is said, after its reasoning or in place of both."""
    reasoning, thought, _ = said(message).rpartition(THOUGHT)
    content: Any = f"{reasoning}{thought}{mark(index)}" if keep_reasoning else mark(index)
    if isinstance(message.get("content"), list):
        content = [{"type": "text", "text": content}]
    return {**message, "content": content}


def _split_at(marks: Sequence[str], skeleton: str) -> list[str]:
    pieces = []
    for mark in marks:
        piece, separator, skeleton = skeleton.partition(mark)
        if not separator or mark in skeleton:
            raise Unrenderable("the chat template does not keep the assistant's turns once each and in order")
        pieces.append(piece)
    return [*pieces, skeleton]


def _end_of_content(text: str, start: int, content: str, after: str, *, last: bool) -> int:
    """End of what is said at `start`, as written or trimmed, with or without its reasoning, followed by `after`."""
    answer = content.rpartition(THOUGHT)[2]
    candidates = [trim(whole) for whole in (content, answer) for trim in (str, str.strip, str.rstrip, str.lstrip)]
    for candidate in [*candidates, answer.lstrip("\n")]:
        end = start + len(candidate)
        if text.startswith(candidate + after, start) and (not last or end + len(after) == len(text)):
            return end
    raise Unrenderable("the chat template changes or leaves out what the assistant said")
