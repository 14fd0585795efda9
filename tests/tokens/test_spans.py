"""Spans of tokens over any Unicode text, for every family of tokenizers."""

from __future__ import annotations

import itertools
import pickle
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from teachercache.errors import ModelError
from teachercache.tokens.spans import SpanFinder, TokenSpans
from teachercache.tokens.token_bytes import TokenBytes

from tokenizer_families import LINES, REAL, SMALL, byte_level, sentencepiece_bpe, wordpiece

ODD = [
    *(
        "👨‍👩‍👧‍👦",
        "🏳️‍🌈",
        "👍🏽",
        "🇩🇪",
        "e\u0301",
        "a\u0308\u0323",
        "ẛ̣",
        "你好",
        "語",
        "مرحبا",
        "لا",
        "한국",
        "ﬁ",
        "①",
        "İ",
        "ß",
    ),
    *(
        "\u200b",
        "\u200e",
        "\u00a0",
        "\u3000",
        "\x00",
        "\x1b",
        "\x7f",
        "\u2028",
        "\ufeff",
        "\U0010ffff",
        "\r\n",
        "\t",
        "  ",
    ),
    *("▁", "##", "<0xE2>", "Ġ", "<s>", "</s>", "<unk>", "[SEP]", "<|im_end|>", "the cat", " sat", ".\n\n"),
]
CHARACTERS = st.characters(exclude_categories=("Cs",))  # all but surrogates, which UTF-8 cannot hold
TEXTS = st.lists(st.one_of(st.sampled_from(ODD), st.text(CHARACTERS, max_size=6)), max_size=12).map("".join)
EXACT = ["byte-level", "byte-level, BOS, offsets whole", "byte-level, prefix space", "tiktoken", "deepseek"]
LOSSY = ["WordPiece, lower case", "WordPiece, cased", "Unigram, NFKC", "minilm", "smollm2"]  # smollm2 lacks some bytes


def encode(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    encoded = tokenizer(text, return_offsets_mapping=True, padding=False, truncation=False)
    return encoded["input_ids"], encoded["offset_mapping"]


def finder(name: str) -> SpanFinder:
    if name not in FINDERS:
        FINDERS[name] = SpanFinder.of({**SMALL, **REAL}[name]())
    return FINDERS[name]


FINDERS: dict[str, SpanFinder] = {}


def check(spans: TokenSpans, text: str, ids: list[int]) -> None:
    """Tokens tile the text, in order."""
    data = text.encode()
    pieces = [data[start:end] for start, end in itertools.pairwise([0, *spans.ends_S.tolist()])]
    assert len(ids) == len(pieces) == len(spans.usable_S) == len(spans.mark_S) and (b"".join(pieces) == data or not ids)
    assert (np.diff(spans.ends_S, prepend=0) >= 0).all()
    assert all(not piece for piece, mark in zip(pieces, spans.mark_S, strict=True) if mark)


@pytest.mark.parametrize("name", [*SMALL, *REAL])
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
@example(text="")
@example(text="  ")
@example(text="\x00")
@example(text="<s>user\nhi</s>\n<s>x ")
@example(text="".join(ODD))
def test_any_text_is_tiled_by_its_tokens(name: str, text: str) -> None:
    find = finder(name)
    ids, chars = encode(find.tokenizer, text)
    with_offsets, without = find.spans(text, ids, chars), find.spans(text, ids)
    if with_offsets is None:  # nothing of the text became a token
        assert not any(end > start for start, end in chars) and text and name in LOSSY
        return
    assert without is not None
    for spans in (with_offsets, without):
        check(spans, text, ids)
    assert np.array_equal(with_offsets.ends_S, without.ends_S)
    if name in EXACT:
        assert with_offsets.exact and with_offsets.usable_S.all()


@pytest.mark.parametrize("name", [name for name in EXACT if "prefix" not in name])
@settings(max_examples=40, deadline=None)
@given(text=TEXTS)
def test_byte_level_spans_equal_a_loop_over_the_tokens(name: str, text: str) -> None:
    """Twin: GPT-2's table, one token at a time. Special tokens that the text spells out stand for their own text."""
    find = finder(name)
    ids, chars = encode(find.tokenizer, text)
    table = _gpt2_table()
    tokens = find.tokenizer.convert_ids_to_tokens(ids)
    ends, data = [], b""
    for index, token, (start, end) in zip(ids, tokens, chars, strict=True):
        if index in find.tokenizer.added_tokens_decoder:
            data += token.encode() if end > start else b""
        else:
            data += bytes(table[char] for char in token)
        ends.append(len(data))
    assert data == text.encode()
    spans = find.spans(text, ids, chars)
    assert spans is not None and spans.ends_S.tolist() == ends


def _gpt2_table() -> dict[str, int]:
    table = {}
    for byte in range(256):
        is_printable = 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or 0xAE <= byte <= 0xFF
        table[chr(byte) if is_printable else chr(256 + len([1 for c in table if ord(c) >= 256]))] = byte
    return table


@pytest.mark.parametrize("name", ["SentencePiece BPE", "SentencePiece BPE, Llama 2", "SentencePiece BPE, Gemma"])
@settings(max_examples=60, deadline=None)
@given(text=TEXTS.filter(lambda text: not re.search(r"▁|<unk>|(^|<s>|</s>)\s", text)))
def test_byte_fallback_is_exact_to_the_byte(name: str, text: str) -> None:
    """Twin: walk along the text, token by token, with a space to spare where a section begins."""
    find = finder(name)
    ids, _ = encode(find.tokenizer, text)
    spans = find.spans(text, ids)
    assert spans is not None and spans.exact and spans.usable_S.all()
    place, is_fresh, data = 0, True, text.encode()
    for index, end in zip(ids, spans.ends_S.tolist(), strict=True):
        token = find.tokenizer.convert_ids_to_tokens(index)
        piece = bytes([int(token[3:5], 16)]) if token.startswith("<0x") else token.replace("▁", " ").encode()
        if index in find.tokenizer.all_special_ids:
            piece = piece if end > place else b""
        elif is_fresh and not data.startswith(piece, place):
            piece = piece[1:]
        assert data[place:end] == piece, (text, token)
        place, is_fresh = end, index in find.tokenizer.all_special_ids


def test_families_are_told_apart() -> None:
    families = {name: TokenBytes.of(make()).family for name, make in SMALL.items()}
    expected = {
        "byte": "byte-level",
        "tikt": "byte-level",
        "Sent": "byte-fallback",
        "Unig": "byte-fallback",
        "Word": "text",
    }
    assert families == {name: expected[name[:4]] for name in SMALL}


def test_bytes_of_single_tokens() -> None:
    def value(tokenizer: Any, token: str) -> bytes | None:
        return TokenBytes.of(tokenizer).values[tokenizer.convert_tokens_to_ids(token)]

    tokenizer = byte_level()
    tokenizer.add_tokens(["Ġé<tool>"])
    assert value(tokenizer, "Ġthe") == b" the" and value(tokenizer, "Ģ") == b"\x80"
    assert value(tokenizer, "</s>") == b"" and value(tokenizer, "Ġé<tool>") == "Ġé<tool>".encode()
    assert TokenBytes.of(tokenizer).contents[tokenizer.eos_token_id] == b"</s>"
    tokenizer = sentencepiece_bpe()
    assert (
        value(tokenizer, "▁the") == b" the"
        and value(tokenizer, "<0xE2>") == b"\xe2"
        and value(tokenizer, "<unk>") is None
    )
    tokenizer = wordpiece()
    assert value(tokenizer, "##t") == b"t" and value(tokenizer, "the") == b"the" and value(tokenizer, "[UNK]") is None


def test_an_id_without_a_token_has_no_bytes() -> None:
    tokenizer = byte_level()
    holes = TokenBytes.of(tokenizer)
    assert holes.size == len(tokenizer) == len(holes.lengths_V) and not (holes.lengths_V < 0).any()
    assert SpanFinder.of(tokenizer).spans("x", [holes.size]) is None  # beyond the vocabulary


def test_a_normaliser_that_changes_text_is_counted() -> None:
    """NFC composes; the tokens' ends are still those of the characters they came from."""
    find = finder("tiktoken, NFC")
    text = "cafe\u0301 au lait"
    ids, chars = encode(find.tokenizer, text)
    spans = find.spans(text, ids, chars)
    assert spans is not None and not spans.exact
    assert len("cafe\u0301".encode()) in spans.ends_S[spans.usable_S] and 5 not in spans.ends_S[spans.usable_S]
    lower = finder("WordPiece, lower case")
    ids, chars = encode(lower.tokenizer, "The CAT sat")
    spans = lower.spans("The CAT sat", ids, chars)
    assert spans is not None and not spans.exact and {3, 7, 11} <= set(spans.ends_S[spans.usable_S].tolist())
    ids, chars = encode(lower.tokenizer, "the cat sat")
    spans = lower.spans("the cat sat", ids)
    assert spans is not None and spans.exact and {3, 7, 11} <= set(spans.ends_S.tolist())


def test_bytes_of_one_character_are_told_apart_in_text_that_was_normalised() -> None:
    find = finder("tiktoken, NFC")
    text = "e\u0301 𝄞"
    ids, chars = encode(find.tokenizer, text)
    spans = find.spans(text, ids, chars)
    assert spans is not None and not spans.exact and len(ids) > 3
    pieces = find.token_bytes.values
    inside = [end for end in spans.ends_S[spans.usable_S].tolist() if 4 < end < len(text.encode())]
    assert inside and pieces[ids[-1]] == text.encode()[inside[-1] :]


def test_marks_are_special_tokens_that_the_text_does_not_spell() -> None:
    find = finder("byte-level, BOS, offsets whole")
    tokenizer = find.tokenizer
    ids, _ = encode(tokenizer, "<s>hi</s>")
    spans = find.spans("<s>hi</s>", [*ids, tokenizer.eos_token_id])
    assert spans is not None and np.flatnonzero(spans.mark_S).tolist() == [0, len(ids)]
    assert spans.ends_S[1] == 3 and spans.ends_S[-1] == spans.ends_S[-2] == 9


@pytest.mark.parametrize("name", ["byte-level", "smollm2"])
@settings(max_examples=30, deadline=None)
@given(text=TEXTS.filter(lambda text: text.isprintable() and text), data=st.data())
def test_windows_of_a_text_are_found_too(name: str, text: str, data: st.DataObject) -> None:
    """Offsets leave out white space, and a window may begin inside a character: its text is what the offsets span."""
    find = finder(name)
    ids, chars = encode(find.tokenizer, text)
    start = data.draw(st.integers(0, len(ids) - 1))
    stop = data.draw(st.integers(start + 1, len(ids)))
    some = [span for span in chars[start:stop] if span[1] > span[0]]
    if not some:
        return
    first, last = min(span[0] for span in some), max(span[1] for span in some)
    spans = find.spans(text[first:last], ids[start:stop], np.array(chars[start:stop]).clip(first, last) - first)
    assert spans is not None and spans.exact
    check(spans, text[first:last], ids[start:stop])
    own = b"".join(find.token_bytes.contents[index] or b"" for index in ids[start:stop]).strip()
    whole = text[first:last].encode().strip()
    assert spans.start_usable == whole.startswith(own[:1]) or own != whole


def test_a_window_inside_a_character_has_no_common_start() -> None:
    find = finder("byte-level")
    ids, _ = encode(find.tokenizer, "😀 x")
    emoji = [index for index in ids if (find.token_bytes.values[index] or b"")[:1] >= b"\x80"]
    assert len(emoji) > 1
    cut = find.spans("😀 x", ids[1:])
    assert cut is not None and not cut.start_usable and cut.usable_S.all()
    cut = find.spans("😀", emoji[:-1])
    assert cut is not None and cut.start_usable and not cut.usable_S[-1]


@pytest.mark.parametrize("name", SMALL)
def test_ids_of_another_text_are_refused(name: str) -> None:
    find = finder(name)
    ids, _ = encode(find.tokenizer, "the quick foxes ran")
    assert find.spans("lazy dogs jumped", ids) is None


@pytest.mark.parametrize("name", SMALL)
def test_lone_surrogates_are_no_text(name: str) -> None:
    assert finder(name).spans("a\ud800b", [3]) is None


def test_a_finder_travels_between_processes() -> None:
    find = finder("SentencePiece BPE")
    copy = pickle.loads(pickle.dumps(find))
    ids, _ = encode(find.tokenizer, LINES[-1])
    expected, got = find.spans(LINES[-1], ids), copy.spans(LINES[-1], ids)
    assert expected is not None and got is not None and np.array_equal(expected.ends_S, got.ends_S)


def test_slow_tokenizers_are_refused() -> None:
    with pytest.raises(ModelError, match="slow"):
        SpanFinder.of(ByT5Tokenizer())
