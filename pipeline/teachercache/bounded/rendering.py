"""The text that a tokenizer's chat template gives for a conversation, within bounds."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from teachercache.bounded.process import BoundedProcess, Exhausted
from teachercache.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 4.0  # of processor time; real templates take a few ms
MEMORY = 2**28
MOST_TEXT = 2**22  # characters
SHORT = 2**16  # bytes of a conversation for which no honest template takes more than that
_LARGER = 32  # times a conversation's size in memory and text, above these

Span = tuple[int, int]
Messages = Sequence[dict[str, Any]]


class Text(NamedTuple):
    """Text that a template writes, and the character spans that it declares as generated, in the order in which they
    end."""

    text: str
    spans: list[Span]


class Unrenderable(Exception):
    """The template refuses a conversation, or does not show where the assistant speaks; `str()` is the reason."""


class ChatTemplate:
    """A tokenizer's chat template, and how much processor time it may take at a time. Raises `ModelError` if it has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        try:
            self.template: str = tokenizer.get_chat_template()
        except ValueError:
            raise ModelError(
                "the tokenizer has no chat template; take a chat model's tokenizer, or text rows (corpus.text_field)"
            ) from None
        if not isinstance(self.template, str):
            raise ModelError("the tokenizer's chat template is no text; take the tokenizer from who made the model")
        self._variables = dict(tokenizer.special_tokens_map)

    def rendered(self, messages: Messages, *, prompt: bool = False) -> Text:
        """The text of a conversation, with `prompt` the one before a reply.

        Raises `Unrenderable` where the template refuses or the conversation is too large for it, `ModelError` where the
        template does not parse, or takes too much for a short conversation.
        """
        [rendering] = self.rendered_all([(messages, prompt)])
        if isinstance(rendering, Unrenderable):
            raise rendering
        return rendering

    def rendered_all(self, conversations: Sequence[tuple[Messages, bool]]) -> list[Text | Unrenderable]:
        """As `rendered`, of several (messages, prompt) at the cost of asking once; who is refused is given as its error."""
        sizes = [_size(messages) for messages, _ in conversations]
        size = sum(sizes)
        most = MOST_TEXT + _LARGER * size
        request = {
            "template": self.template,
            "variables": {"tools": None, "documents": None, **self._variables},
            "conversations": [
                {"messages": list(messages), "add_generation_prompt": prompt} for messages, prompt in conversations
            ],
            "most": most,
        }
        try:
            seconds, memory = self._seconds + size / 2**20, MEMORY + _LARGER * size
            answer = _process(os.getpid()).ask(request, seconds=seconds, memory=memory, most=16 * most)
        except Exhausted as error:
            answer = {"exhausted": str(error)}
        if isinstance(answer, list):
            return [_text(item) for item in answer]
        if "syntax" in answer:
            raise ModelError(
                f"the tokenizer's chat template does not parse: {answer['syntax']}; take the tokenizer from who made the model"
            )
        raise _too_much(answer["exhausted"], max(sizes, default=0), seconds=self._seconds)


def _text(item: dict[str, Any]) -> Text | Unrenderable:
    if "refused" in item:
        return Unrenderable(f"the chat template refuses it: {item['refused']}")
    return Text(item["text"], [(start, end) for start, end in item["spans"]])


def _too_much(what: str, size: int, *, seconds: float) -> Exception:
    """Real templates are far from these bounds; with a long conversation, it may be the conversation."""
    reason = {
        "time": f"takes more than {seconds:g} s",
        "text": f"writes more than {MOST_TEXT} characters",
        "stack": "calls itself without end",
    }.get(what, f"takes more than {MEMORY >> 20} MiB")
    if size > SHORT:
        return Unrenderable(f"the chat template {reason}")
    return ModelError(
        f"the tokenizer's chat template {reason} for a conversation of {size} bytes: take the tokenizer from who made the model"
    )


def _size(value: Any) -> int:
    """About the bytes of a conversation."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(_size(part) for pair in value.items() for part in pair)
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 8


@functools.cache  # one for all templates of a process; a fork has its own
def _process(pid: int) -> BoundedProcess:
    return BoundedProcess("templates")
