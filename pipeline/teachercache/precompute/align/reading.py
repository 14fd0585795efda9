"""Text of a segment as a student reads it: the teacher's text, or, of a conversation, its messages as the student's own
template writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from teachercache.bounded import Unrenderable
from teachercache.corpus.chat import ChatRenderer
from teachercache.corpus.contents import contents_of
from teachercache.corpus.windows import byte_offsets
from teachercache.tokens.alignment import Region
from teachercache.tokens.rows import Content, Segment

OMITTED = "…"  # what was said before a window
NO_TEXT = "a segment has no text"
NO_CONTENTS = "nothing that was said is found in both texts"


@dataclass(frozen=True, eq=False)
class Read:
    """Text that the student reads of a segment, and the regions in which it is the teacher's."""

    text: str
    regions: list[Region]


class Reader:
    """Reads plain text, or conversations by the chat template of `renderer`."""

    def __init__(self, renderer: ChatRenderer | None) -> None:
        self._renderer = renderer

    def __call__(self, segment: Segment) -> Read | str:
        """Returns the student's text, or the reason why there is none."""
        if segment.text is None:
            return NO_TEXT
        if self._renderer is not None:
            return self._rendered(self._renderer, segment.text, segment.contents)
        size = len(segment.text.encode())
        return Read(segment.text, [Region(0, size, 0, size)])

    @staticmethod
    def _rendered(renderer: ChatRenderer, text: str, contents: Sequence[Content]) -> Read | str:
        """The teacher's own text where both templates write the same."""
        data = text.encode()
        texts = [data[content.start : content.end].decode(errors="replace") for content in contents]
        messages = [
            {"role": content.role, "content": message} for content, message in zip(contents, texts, strict=True)
        ]
        if not messages:
            return NO_CONTENTS
        try:
            rendered, starts = _render(renderer, messages)
        except Unrenderable as error:
            return f"the student's template: {error}"
        if rendered == text:
            return Read(text, [Region(0, len(data), 0, len(data))])
        places = byte_offsets(rendered)
        regions, rest = [], list(starts)
        for content, message in zip(contents, texts, strict=True):
            kept = message.strip()  # a window may have cut it at white space, which templates strip
            same = (text for text in rest if text.role == content.role and rendered[text.start : text.end] == kept)
            match = next(same, None)
            if match is None:
                continue  # the student's template changes it, or leaves it out
            rest = rest[rest.index(match) + 1 :]
            start = content.start + len(message[: len(message) - len(message.lstrip())].encode())
            end = start + len(kept.encode())
            regions.append(Region(start, end, int(places[match.start]), int(places[match.end])))
        return Read(rendered, regions) if regions else NO_CONTENTS


def _render(renderer: ChatRenderer, messages: list[dict[str, str]]) -> tuple[str, list[Content]]:
    """The text of a conversation and where its contents stand. A window may begin with a reply, which some templates refuse:
    then it is put after a user's turn that says nothing known."""
    try:
        text = renderer.render(messages).text
    except Unrenderable:
        if messages[0]["role"] == "user":
            raise
        messages = [{"role": "user", "content": OMITTED}, *messages]
        text = renderer.render(messages).text
    return text, contents_of(renderer, messages, text)
