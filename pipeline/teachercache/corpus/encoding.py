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
from teachercache.corpus.slices import SLICE_CHARACTERS, Slicer, Tokens, joined
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
    char_spans_S2: NDArray[np.int32]
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
    """Encode each source, in order, as if it were tokenised whole.

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
                ids_S, chars_S2 = (
                    np.append(ids_S, np.int32(eos)),
                    np.append(chars_S2, np.zeros((1, 2), np.int32), axis=0),
                )
        if not (is_chat and begins_with(ids_S, prefix)):
            ids_S = np.concatenate([np.array(prefix, np.int32), ids_S])
            chars_S2 = np.concatenate([np.zeros((len(prefix), 2), np.int32), chars_S2])
        targets_S = _targets(source, chars_S2)
        targets_S[: max(len(prefix) - 1, 0)] = False
        yield Encoded(source.document, source.text, ids_S, chars_S2, targets_S, source.contents, prefix)


def _targets(source: Source, chars_S2: NDArray[np.int32]) -> NDArray[np.bool_]:
    if source.assistant_spans is not None:
        return assistant_targets(chars_S2, source.assistant_spans, characters=len(source.text))
    return np.arange(len(chars_S2)) < len(chars_S2) - 1


def _call(sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokens]:
    """Tokens of each source; many short ones in one call, a long one in slices."""
    slicer = Slicer(tokenizer, lambda text: _batched([text], tokenizer, special=False)[0])
    for chat, chosen in _calls(sources):
        texts = [source.text for source in chosen]
        if len(texts) > 1 or len(texts[0]) <= 2 * SLICE_CHARACTERS:
            yield from _batched(texts, tokenizer, special=not chat)
        else:
            yield _in_slices(texts[0], tokenizer, slicer, special=not chat)


def _calls(sources: Sequence[Source]) -> Iterator[tuple[bool, list[Source]]]:
    """Neighbours of one kind (conversations, or none), together as long as a slice."""
    group: list[Source] = []
    size = 0
    for source in sources:
        is_chat = source.assistant_spans is not None
        if group and (size + len(source.text) > SLICE_CHARACTERS or is_chat != (group[0].assistant_spans is not None)):
            yield group[0].assistant_spans is not None, group
            group, size = [], 0
        group.append(source)
        size += len(source.text)
    if group:
        yield group[0].assistant_spans is not None, group


def _in_slices(text: str, tokenizer: PreTrainedTokenizerBase, slicer: Slicer, *, special: bool) -> Tokens:
    slices = slicer.slices(text)
    if len(slices) == 1:
        return _batched([text], tokenizer, special=special)[0]
    ids_S, chars_S2 = joined([slicer.tokenise(part) for part in slices], slices)
    if not special:
        return ids_S, chars_S2
    before, after = _special_tokens(tokenizer)
    ends = [np.zeros((len(ids), 2), np.int32) for ids in (before, after)]
    return np.concatenate([before, ids_S, after]), np.concatenate([ends[0], chars_S2, ends[1]])


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The tokens that the tokenizer puts before and behind a text."""
    (plain, _), (whole, _) = (_batched(["a"], tokenizer, special=special)[0] for special in (False, True))
    before = len(own_prefix(tokenizer))
    return whole[:before], whole[before + len(plain) :]


def _batched(texts: list[str], tokenizer: PreTrainedTokenizerBase, *, special: bool) -> list[Tokens]:
    batch = tokenizer(
        texts,
        add_special_tokens=special,
        padding=False,
        truncation=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # documents longer than the model are windowed: no warning is due
    )
    return [
        (np.array(ids, dtype=np.int32), np.array(chars, dtype=np.int32).reshape(-1, 2))
        for ids, chars in zip(batch["input_ids"], batch["offset_mapping"], strict=True)
    ]


def assistant_targets(chars_S2: NDArray[np.int32], spans: Iterable[Span], *, characters: int) -> NDArray[np.bool_]:
    """Mask of shape [S], True at i where token i + 1 holds a character of an assistant span; these ascend and are disjoint.

    A token that reaches over the edge of a span counts: it is what the model would have to generate there. Tokens
    without text never count.
    """
    bounds = np.array([span for span in spans if span[0] < span[1]], dtype=np.int64).reshape(-1, 2)
    next_N = np.searchsorted(
        bounds[:, 1], chars_S2[:, 0], side="right"
    )  # the first span that ends behind a token's beginning
    starts = np.append(bounds[:, 0], characters)
    is_assistant_S = (chars_S2[:, 0] < chars_S2[:, 1]) & (starts[next_N] < chars_S2[:, 1])
    return np.append(is_assistant_S[1:], np.zeros(min(len(chars_S2), 1), dtype=np.bool_))
