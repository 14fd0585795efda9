"""Documents in tokens: ids, the characters each token stands for, and which tokens are to be learned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from teachercache.bounded import Unrenderable
from teachercache.corpus.chat import ChatRenderer, Span
from teachercache.corpus.contents import contents_of
from teachercache.corpus.documents import Document
from teachercache.tokens.prefix import begins_with, own_prefix
from teachercache.tokens.rows import Content

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Encoded:
    """A document in tokens, the `prefix` of all rows first. Tokens that stand for no text (BOS, an appended EOS) have empty
    character spans."""

    document: Document
    text: str  # of a conversation: as rendered
    input_ids_S: NDArray[np.int32]
    char_spans_S2: NDArray[np.int64]
    target_mask_S: NDArray[np.bool_]  # True at i: token i + 1 is to be learned; False for the last
    contents: Sequence[Content] = ()  # of a conversation, by characters of the text
    prefix: tuple[int, ...] = ()


class Source(NamedTuple):
    """A text to encode; `assistant_spans` is None where every token is to be learned. `contents` are spans of
    characters."""

    document: Document
    text: str
    assistant_spans: list[Span] | None
    contents: Sequence[Content] = ()


def source_of(document: Document, renderer: ChatRenderer | None, *, contents: bool = False) -> Source:
    """The text to encode and, if asked for, where the messages of a conversation stand in it. Raises `Unrenderable` with the
    reason when there is none that a tokenizer could read."""
    if document.problem is not None:
        raise Unrenderable(document.problem)
    text, spans, message_contents = document.text or "", None, []
    if document.messages is not None and renderer is not None:
        text, spans = renderer.render(document.messages)
        message_contents = contents_of(renderer, document.messages, text) if contents else []
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Unrenderable(f"not valid Unicode: lone surrogate at character {error.start}") from None
    return Source(document, text, spans, message_contents)


def encode(
    sources: Sequence[Source], *, tokenizer: PreTrainedTokenizerBase, add_eos: bool, prefix: tuple[int, ...] = ()
) -> Iterator[Encoded]:
    """Encode each source whole, in order, with two batched calls of the tokenizer.

    All begin with `prefix`, in place of what the tokenizer would put before a text. Text takes the special tokens that it
    puts at the end, and EOS with `add_eos`; rendered conversations take neither, because the chat template has written
    them, the prefix too where it does.
    """
    own_ids = own_prefix(tokenizer)
    eos = tokenizer.eos_token_id if add_eos else None
    for source, (ids_S, chars_S2) in zip(sources, _call(sources, tokenizer), strict=True):
        is_chat = source.assistant_spans is not None
        if not is_chat:
            ids_S, chars_S2 = ids_S[len(own_ids) :], chars_S2[len(own_ids) :]
            if eos is not None and (len(ids_S) == 0 or ids_S[-1] != eos):  # some tokenizers append it themselves
                ids_S, chars_S2 = np.append(ids_S, np.int32(eos)), np.append(chars_S2, [[0, 0]], axis=0)
        if not (is_chat and begins_with(ids_S, prefix)):
            ids_S = np.concatenate([np.array(prefix, np.int32), ids_S])
            chars_S2 = np.concatenate([np.zeros((len(prefix), 2), np.int64), chars_S2])
        targets_S = _targets(source, chars_S2)
        targets_S[: max(len(prefix) - 1, 0)] = False
        yield Encoded(source.document, source.text, ids_S, chars_S2, targets_S, source.contents, prefix)


def _targets(source: Source, chars_S2: NDArray[np.int64]) -> NDArray[np.bool_]:
    if source.assistant_spans is not None:
        return assistant_targets(chars_S2, source.assistant_spans, characters=len(source.text))
    return np.arange(len(chars_S2)) < len(chars_S2) - 1


def _call(
    sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[NDArray[np.int32], NDArray[np.int64]]]:
    results: dict[int, tuple[NDArray[np.int32], NDArray[np.int64]]] = {}
    for chat in (False, True):
        chosen = [index for index, source in enumerate(sources) if (source.assistant_spans is not None) == chat]
        if not chosen:
            continue
        batch = tokenizer(
            [sources[index].text for index in chosen],
            add_special_tokens=not chat,
            padding=False,
            truncation=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # documents longer than the model are windowed: no warning is due
        )
        for index, ids, chars in zip(chosen, batch["input_ids"], batch["offset_mapping"], strict=True):
            results[index] = np.array(ids, dtype=np.int32), np.array(chars, dtype=np.int64).reshape(-1, 2)
    return [results[index] for index in range(len(sources))]


def assistant_targets(chars_S2: NDArray[np.int64], spans: Iterable[Span], *, characters: int) -> NDArray[np.bool_]:
    """Mask of shape [S], True at i where token i + 1 holds a character of an assistant span.

    A token that reaches over the edge of a span counts: it is what the model would have to generate there. Tokens
    without text never count.
    """
    written = np.zeros(characters, dtype=np.int64)
    for start, end in spans:
        written[start:end] = 1
    before = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(written)])
    is_assistant_S = before[chars_S2[:, 1]] > before[chars_S2[:, 0]]
    return np.append(is_assistant_S[1:], np.zeros(min(len(chars_S2), 1), dtype=np.bool_))
