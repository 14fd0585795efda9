"""Sequences: documents tokenised, windowed, packed and masked. A pure function of its arguments.

`documents` layout: one row a window. `packed` layout: windows share rows of at most `sequence.length` tokens, train and
held-out ones apart; each keeps its own targets and none reaches across a boundary. Packing depends on the set of
documents, not on their order.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from teachercache.bounded import Unrenderable
from teachercache.config import SequenceConfig
from teachercache.corpus.chat import ChatRenderer
from teachercache.corpus.documents import Document, canonical_json
from teachercache.corpus.encoding import Encoded, Source, encode, source_of
from teachercache.corpus.packing import best_fit_decreasing
from teachercache.corpus.windows import Window, check_room, cut
from teachercache.tokens.fingerprint import require_fast
from teachercache.tokens.prefix import row_prefix
from teachercache.tokens.rows import Segment, TokenRow, row_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXCERPT_CHARACTERS = 200
_BATCH = 256  # documents in one call of the tokenizer: bounds its memory, changes no result


@dataclass(frozen=True)
class Quarantined:
    """A document, or a window of it, of which nothing is stored, and why. A window has its span of UTF-8 bytes in the
    document."""

    source_id: str
    occurrence: int
    reason: str
    excerpt: str
    byte_start: int | None = None
    byte_end: int | None = None


@dataclass
class Tokenised:
    """Result of a batch of documents: each is either quarantined or has at least one stored window.

    In the `documents` layout, rows = documents - quarantined + extra_windows.
    """

    rows: list[TokenRow] = field(default_factory=list)
    quarantined: list[Quarantined] = field(default_factory=list)
    windowed_documents: int = 0  # documents longer than one window
    extra_windows: int = 0  # stored windows beyond the first of each document
    windows_without_targets: int = 0  # windows of stored documents with nothing to learn, not stored (long prompts)


def tokenise(
    documents: Sequence[Document],
    *,
    tokenizer: PreTrainedTokenizerBase,
    sequence: SequenceConfig,
    store_text: bool,
    prefix: Sequence[int] | None = None,
) -> Tokenised:
    """Token rows of `documents`, and those that cannot be used, each with its reason.

    Every window begins with `prefix` (default: what `sequence.prefix` means for this tokenizer). Text gets the special
    tokens that the tokenizer puts at its end and EOS when `sequence.add_eos`; conversations get what the chat template
    writes, and only assistant tokens are targets. Raises `ModelError` for a tokenizer without character offsets, or without a
    chat template when there are conversations; `RecipeError` for a length that leaves nothing to predict.
    """
    require_fast(tokenizer)
    renderer = ChatRenderer(tokenizer) if any(document.messages is not None for document in documents) else None
    if prefix is None:
        prefix = row_prefix(tokenizer, sequence.prefix, chats=renderer is not None)
    check_room(length=sequence.length, prefix=len(prefix), context=sequence.context)
    result = Tokenised()
    windows: list[Window] = []
    for first in range(0, len(documents), _BATCH):
        sources = _sources(documents[first : first + _BATCH], renderer, result, contents=store_text)
        for encoded in encode(sources, tokenizer=tokenizer, add_eos=sequence.add_eos, prefix=tuple(prefix)):
            windows += _kept(encoded, result, sequence=sequence, store_text=store_text)
    bins = [[window] for window in windows] if sequence.layout == "documents" else _pack(windows, sequence.length)
    result.rows += _rows(bins)
    return result


def _sources(
    documents: Sequence[Document], renderer: ChatRenderer | None, result: Tokenised, *, contents: bool
) -> list[Source]:
    sources = []
    for document in documents:
        try:
            sources.append(source_of(document, renderer, contents=contents))
        except Unrenderable as error:
            result.quarantined.append(_quarantined(document, str(error)))
    return sources


def _kept(encoded: Encoded, result: Tokenised, *, sequence: SequenceConfig, store_text: bool) -> list[Window]:
    windows = cut(encoded, length=sequence.length, context=sequence.context, store_text=store_text)
    kept = [window for window in windows if window.target_mask_S.any()]
    if not kept:
        of_text = encoded.document.messages is None or len(encoded.input_ids_S) < 2
        reason = "fewer than 2 tokens" if of_text else "no assistant tokens"
        result.quarantined.append(_quarantined(encoded.document, reason))
        return []
    result.windowed_documents += len(windows) > 1
    result.extra_windows += len(kept) - 1
    result.windows_without_targets += len(windows) - len(kept)
    return kept


def _pack(windows: Sequence[Window], length: int) -> list[list[Window]]:
    bins = []
    for held_out in (False, True):
        group = sorted((window for window in windows if window.held_out == held_out), key=_content_key)
        sizes = [len(window.input_ids_S) for window in group]
        bins += [[group[index] for index in indices] for indices in best_fit_decreasing(sizes, capacity=length)]
    return bins


def _content_key(window: Window) -> tuple[str, int, int, int]:
    segment = window.segment
    return segment.source_id, segment.occurrence, segment.byte_start, segment.byte_end


def _rows(bins: Iterable[Sequence[Window]]) -> Iterator[TokenRow]:
    repeats: Counter[str] = Counter()
    for windows in bins:
        segments = tuple(_placed(windows))
        name = row_id(segments)
        yield TokenRow(
            row_id=name if not repeats[name] else row_id(segments, repeat=repeats[name]),
            held_out=windows[0].held_out,
            input_ids_S=np.concatenate([window.input_ids_S for window in windows]),
            target_mask_S=np.concatenate([window.target_mask_S for window in windows]),
            segments=segments,
        )
        repeats[name] += 1


def _placed(windows: Sequence[Window]) -> Iterator[Segment]:
    start = 0
    for window in windows:
        yield dataclasses.replace(window.segment, start=start)
        start += len(window.input_ids_S)


def _quarantined(document: Document, reason: str) -> Quarantined:
    content = document.text if document.text is not None else canonical_json(document.messages)
    excerpt = content[:EXCERPT_CHARACTERS].encode("utf-8", errors="backslashreplace").decode("utf-8")
    return Quarantined(document.source_id, document.occurrence, reason, excerpt)
