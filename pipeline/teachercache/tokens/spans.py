"""Token spans: finds the end of each token in a text's UTF-8 bytes.

First by the bytes that the tokens stand for: one concatenation, one comparison, which also prove the result. Where these
are not the text (a normaliser changed it, the vocabulary does not define them), by the character offsets that a fast tokenizer
reports.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from teachercache.tokens.panics import panics_refused
from teachercache.tokens.token_bytes import TokenBytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WHITE = b" \t\n\r\x0b\x0c"
_IS_WHITE = np.isin(np.arange(256), list(_WHITE))
_LONGEST_CHARACTER = 4  # bytes
_ADDED_MARKS = 3  # special tokens that a tokenizer adds before or after a text


@dataclass(frozen=True, eq=False)
class TokenSpans:
    """Token i stands for bytes `ends_S[i - 1]` to `ends_S[i]` of the text, the first from 0 on.

    Together they are the whole text: white space that no token has belongs to the token after it, at the end to the last
    token with text. `ends_S` never falls.
    """

    ends_S: NDArray[np.int64]
    usable_S: NDArray[np.bool_]  # False where that end is not exactly known: no chunk may end there
    mark_S: NDArray[np.bool_]  # special tokens that stand for no text: BOS, an appended EOS
    exact: bool  # the tokens' bytes are the text's, white space at their edges aside; False: found by character offsets
    start_usable: bool = True  # False where the first token holds only the end of a character (a window cut inside it)


@dataclass(frozen=True, eq=False)
class SpanFinder:
    """Finds the spans of one tokenizer's tokens; can be pickled."""

    tokenizer: Any
    token_bytes: TokenBytes

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> SpanFinder:
        """Raises `ModelError` for a tokenizer without a fast backend."""
        return cls(tokenizer, TokenBytes.of(tokenizer))

    def spans(self, text: str, ids_S: Any, chars_S2: Any = None) -> TokenSpans | None:
        """The spans of the tokens `ids_S` [S] in `text`, None where the tokenizer does not round-trip it.

        `chars_S2` are the offsets that the tokenizer reported for them, in characters of `text`. Without, and where the
        bytes do not show the spans, the text is encoded again, which helps only if that gives the same ids.
        What it costs is measured by tests/bench/alignment_speed.py.
        """
        try:
            data = text.encode()
        except UnicodeEncodeError:  # lone surrogates: no tokenizer reads them
            return None
        ids_S = np.asarray(ids_S, dtype=np.int64)
        if len(ids_S) and not 0 <= ids_S.min() <= ids_S.max() < self.token_bytes.size:
            return None
        chars_S2 = None if chars_S2 is None else np.asarray(chars_S2, dtype=np.int64).reshape(-1, 2)
        spans = self._by_bytes(data, ids_S, chars_S2)
        if spans is not None:
            return spans
        if chars_S2 is None:
            chars_S2 = self._encode_again(text, ids_S)
        return None if chars_S2 is None else self._by_characters(text, data, ids_S, chars_S2)

    def _by_bytes(self, data: bytes, ids_S: NDArray[Any], chars_S2: NDArray[Any] | None) -> TokenSpans | None:
        lengths_S = self.token_bytes.lengths_V[ids_S]
        if lengths_S.min(initial=0) < 0:
            return None
        special_S = self.token_bytes.special_V[ids_S]
        ids = ids_S.tolist()
        pieces: list[Any] = [self.token_bytes.values[index] for index in ids]
        if b"".join(pieces) == data:
            return _exact(lengths_S, special_S, len(data))
        for written_S in _written_candidates(special_S, chars_S2):
            for index in np.flatnonzero(special_S).tolist():
                pieces[index] = (self.token_bytes.contents[ids[index]] or b"") if written_S[index] else b""
                lengths_S[index] = len(pieces[index])
            tokens = _Tokens(pieces, lengths_S, special_S & ~written_S, written_S)
            spans = tokens.found(data)
            if spans is not None:
                return spans
        return None

    @panics_refused()
    def _encode_again(self, text: str, ids_S: NDArray[Any]) -> NDArray[Any] | None:
        """Character offsets of the tokens; None if the tokenizer now gives others, special ones before or after aside."""
        encoded = self.tokenizer(
            text, add_special_tokens=False, padding=False, truncation=False, return_offsets_mapping=True, verbose=False
        )
        again_S = np.array(encoded["input_ids"], dtype=np.int64)
        special_S = self.token_bytes.special_V[ids_S]
        for first in range(len(ids_S) - len(again_S) + 1):
            stop = first + len(again_S)
            if np.array_equal(ids_S[first:stop], again_S) and special_S[stop:].all():
                chars_S2 = np.zeros((len(ids_S), 2), dtype=np.int64)
                chars_S2[first:stop] = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
                return chars_S2
            if not special_S[first : first + 1].all():
                break
        return None

    def _by_characters(self, text: str, data: bytes, ids_S: NDArray[Any], chars_S2: NDArray[Any]) -> TokenSpans | None:
        if len(chars_S2) != len(ids_S) or chars_S2.min(initial=0) < 0 or chars_S2.max(initial=0) > len(text):
            return None
        has_text_S = chars_S2[:, 1] > chars_S2[:, 0]
        if data and not has_text_S.any():
            return None
        mark_S = self.token_bytes.special_V[ids_S] & ~has_text_S
        byte_of_char = _byte_offsets(text)
        ends_S = np.maximum.accumulate(np.where(has_text_S, byte_of_char[chars_S2[:, 1]], 0))
        starts_S = np.where(has_text_S, byte_of_char[chars_S2[:, 0]], len(data))
        later_S = np.append(np.minimum.accumulate(starts_S[::-1])[::-1][1:], len(data))  # where later tokens begin
        usable_S = ends_S <= later_S
        _take_what_was_dropped(data, ends_S, later_S, usable_S & has_text_S)
        _tell_apart([self.token_bytes.values[index] for index in ids_S.tolist()], data, ends_S, usable_S)
        self._doubt_white_space(ids_S, data, ends_S, usable_S, has_text_S)
        _reach_the_end(ends_S, usable_S, mark_S, len(data))
        return TokenSpans(ends_S, usable_S, mark_S, exact=False)

    def _doubt_white_space(
        self, ids_S: NDArray[Any], data: bytes, ends_S: NDArray[Any], usable_S: NDArray[Any], has_text_S: NDArray[Any]
    ) -> None:
        """Tokenizers may leave white space at a token's edge out of its offsets: then it does not end where they say."""
        for index in np.flatnonzero(usable_S & (ends_S < len(data))).tolist():
            if data[ends_S[index]] in _WHITE:
                value = self.token_bytes.values[ids_S[index]]
                usable_S[index] = not (value and value[-1] in _WHITE) and has_text_S[index]


@dataclass(frozen=True, eq=False)
class _Tokens:
    """The bytes of a text's tokens, once it is assumed which special tokens the text spells out."""

    pieces: list[bytes]
    lengths_S: NDArray[np.int64]
    mark_S: NDArray[np.bool_]
    written_S: NDArray[np.bool_]  # special tokens that are in the text

    def found(self, data: bytes) -> TokenSpans | None:
        concatenated = b"".join(self.pieces)
        if concatenated == data:
            return _exact(self.lengths_S, self.mark_S, len(data))
        return (
            self._but_for_edges(concatenated, data)
            or self._by_sections(data)
            or self._but_for_white_space(concatenated, data)
        )

    def _but_for_edges(self, concatenated: bytes, data: bytes) -> TokenSpans | None:
        """Other white space at the ends (a dummy prefix; offsets that leave it out), or characters cut at a window's."""
        core, token_core = data.strip(_WHITE), concatenated.strip(_WHITE)
        missing = len(core) - len(token_core)
        if not token_core or not 0 <= missing < 2 * _LONGEST_CHARACTER:
            return None
        for cut in range(min(missing, _LONGEST_CHARACTER - 1) + 1):
            end = len(core) - (missing - cut)
            if core[cut:end] == token_core and _continues(core[1 : cut + 1]) and _continues(core[end:]):
                lead = (len(data) - len(data.lstrip(_WHITE))) - (len(concatenated) - len(concatenated.lstrip(_WHITE)))
                ends_S = np.clip(np.cumsum(self.lengths_S) + (cut + lead), 0, len(data))
                ends_S[np.cumsum(self.lengths_S) == 0] = 0
                spans = _finished(ends_S, np.ones(len(ends_S), dtype=np.bool_), self.mark_S, len(data), cut == 0)
                if end < len(core):
                    spans.usable_S[spans.ends_S == len(data)] = False
                return spans
        return None

    def _by_sections(self, data: bytes) -> TokenSpans | None:
        """A space before every section between special tokens: SentencePiece's dummy prefix."""
        place, first = 0, 0
        ends_S = np.zeros(len(self.pieces), dtype=np.int64)
        for stop in [*np.flatnonzero(self.written_S).tolist(), len(self.pieces)]:
            section = b"".join(self.pieces[first:stop])
            dropped = 0 if data.startswith(section, place) else 1
            if dropped and not (section[:1] == b" " and data.startswith(section[1:], place)):
                return None
            ends_S[first:stop] = place + np.maximum(np.cumsum(self.lengths_S[first:stop]) - dropped, 0)
            place += len(section) - dropped
            if stop < len(self.pieces):
                if not data.startswith(self.pieces[stop], place):
                    return None
                place += len(self.pieces[stop])
                ends_S[stop] = place
            first = stop + 1
        if place != len(data):
            return None
        return _finished(ends_S, np.ones(len(ends_S), dtype=np.bool_), self.mark_S, len(data))

    def _but_for_white_space(self, concatenated: bytes, data: bytes) -> TokenSpans | None:
        """White space that the tokens do not have (WordPiece, normalisers that squeeze it) belongs to the one after it."""
        token_text = concatenated.translate(None, _WHITE)
        if not token_text or token_text != data.translate(None, _WHITE):
            return None
        is_text_B = ~_IS_WHITE[np.frombuffer(concatenated, dtype=np.uint8)]
        before_B = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(is_text_B)])  # bytes of text up to each place
        places = np.flatnonzero(~_IS_WHITE[np.frombuffer(data, dtype=np.uint8)]) + 1
        last_S = np.cumsum(self.lengths_S)
        ends_S = np.concatenate([np.zeros(1, dtype=np.int64), places])[before_B[last_S]]
        usable_S = (self.lengths_S == 0) | is_text_B[np.maximum(last_S - 1, 0)]
        return _finished(ends_S, usable_S, self.mark_S, len(data))


def _written_candidates(special_S: NDArray[Any], chars_S2: NDArray[Any] | None) -> Iterator[NDArray[Any]]:
    """Yields guesses of which special tokens are in the text: what the offsets say, all, none, all but some at the
    ends."""
    if chars_S2 is not None and len(chars_S2) == len(special_S):
        yield special_S & (chars_S2[:, 1] > chars_S2[:, 0])
    yield special_S
    if not special_S.any():
        return
    yield np.zeros_like(special_S)
    others = np.flatnonzero(~special_S)
    leading = int(others[0]) if len(others) else len(special_S)
    trailing = len(special_S) - 1 - int(others[-1]) if len(others) else len(special_S)
    counts = itertools.product(range(min(leading, _ADDED_MARKS) + 1), range(min(trailing, _ADDED_MARKS) + 1))
    for first, last in sorted(counts, key=lambda pair: (sum(pair), abs(pair[0] - pair[1]), pair[1])):
        if 0 < first + last <= len(special_S):
            written_S = special_S.copy()
            written_S[:first] = False
            written_S[len(special_S) - last :] = False
            yield written_S


def _exact(lengths_S: NDArray[Any], mark_S: NDArray[Any], size: int) -> TokenSpans:
    return TokenSpans(np.cumsum(lengths_S), np.ones(len(lengths_S), dtype=np.bool_), mark_S.copy(), exact=True)


def _finished(
    ends_S: NDArray[Any], usable_S: NDArray[Any], mark_S: NDArray[Any], size: int, start_usable: bool = True
) -> TokenSpans:
    _reach_the_end(ends_S, usable_S, mark_S, size)
    return TokenSpans(ends_S, usable_S, mark_S.copy(), exact=True, start_usable=start_usable)


def _reach_the_end(ends_S: NDArray[Any], usable_S: NDArray[Any], mark_S: NDArray[Any], size: int) -> None:
    """White space after the last token with text belongs to it, and to tokens after it that can only hold that."""
    with_text = np.flatnonzero(~mark_S & (np.diff(ends_S, prepend=0) > 0))
    if len(with_text) and ends_S[-1] < size:
        last = with_text[-1]
        others = np.flatnonzero(~mark_S[last:]) + last
        ends_S[last:] = size
        usable_S[others] = False
        usable_S[others[-1]] = True


def _take_what_was_dropped(data: bytes, ends_S: NDArray[Any], later_S: NDArray[Any], candidate_S: NDArray[Any]) -> None:
    """Text between two tokens that is no white space belongs to the first: marks that NFC composes with their letter."""
    for index in np.flatnonzero(candidate_S & (later_S > ends_S)).tolist():
        start, dropped = int(ends_S[index]), data[ends_S[index] : later_S[index]].decode()
        before_white = dropped[: len(dropped) - len(dropped.lstrip())] or dropped.split(maxsplit=1)[0]
        if not before_white.isspace():
            end = start + len(before_white.encode())
            ends_S[index:][ends_S[index:] == start] = end  # tokens without text after it stay there


def _continues(data: bytes) -> bool:
    """Tells whether these bytes only continue a character: none begins here."""
    return all(0x80 <= byte < 0xC0 for byte in data)


def _tell_apart(values: list[bytes | None], data: bytes, ends_S: NDArray[Any], usable_S: NDArray[Any]) -> None:
    """Tokens that share characters end inside them, where their bytes are those of the characters."""
    usable_S[-1:] = True
    stops = np.flatnonzero(usable_S) + 1
    for first, stop in zip(np.append(0, stops[:-1]).tolist(), stops.tolist(), strict=True):
        if stop - first > 1:
            pieces = values[first:stop]
            start = int(ends_S[first - 1]) if first else 0
            if None not in pieces and b"".join(pieces) == data[start : ends_S[stop - 1]]:  # type: ignore[arg-type]
                ends_S[first:stop] = start + np.cumsum([len(piece or b"") for piece in pieces])
                usable_S[first:stop] = True


def _byte_offsets(text: str) -> NDArray[np.int64]:
    """UTF-8 byte offset of every character and of the end; shape [len(text) + 1]."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(widths)])
