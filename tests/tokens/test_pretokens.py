"""Tokens that begin a new pre-token, by tokenizers of several families."""

from __future__ import annotations

import unicodedata
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from teachercache.errors import ModelError
from teachercache.tokens.pretokens import begins_pretoken

from builders import tiny_tokenizer


def fast(backend: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def byte_level(tokens: list[str], pre_tokenizer: Any = None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return fast(backend)


def chosen(tokenizer: Any, tokens: list[str]) -> set[str]:
    begins_V = begins_pretoken(tokenizer)
    assert begins_V.dtype == np.bool_
    return {token for token in tokens if begins_V[tokenizer.convert_tokens_to_ids(token)]}


def spelled(text: str | bytes) -> str:
    """As byte-level tokenizers spell it."""
    data = text.encode() if isinstance(text, str) else text
    backend = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    printable = backend.alphabet()
    table = {byte: chr(byte) for byte in range(256) if chr(byte) in printable}
    spare = iter(sorted(set(printable) - set(table.values())))
    table |= {byte: next(spare) for byte in range(256) if byte not in table}
    return "".join(table[byte] for byte in data)


def test_byte_level_tokens_by_the_tokenizers_own_cuts() -> None:
    begin = [" the", " ", "\n", "\n\n", ".", ",", "'s", "'", "1", "42", "-ing", "…", "—"]
    continue_ = ["the", "ing", "a", "Z", "ß", "é", "東", "ا"]
    tokens = [spelled(text) for text in [*begin, *continue_]]
    assert chosen(byte_level(tokens), tokens) == {spelled(text) for text in begin}


def test_another_pre_tokenizer_cuts_elsewhere() -> None:
    """As o200k does: a capital after a small letter is a new pre-token, a digit is not."""
    pattern = pre_tokenizers.Split(Regex(r"\p{Lu}*[\p{Ll}0-9]+|\p{Lu}+|\s+|[^\p{L}\s]+"), "isolated")
    own = pre_tokenizers.Sequence([pattern, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokens = [spelled(text) for text in ["Case", "case", "9", "."]]
    assert chosen(byte_level(tokens, own), tokens) == {"Case", "."}


def test_a_character_that_is_cut_counts_by_what_it_may_become() -> None:
    begin = [b"\xe2\x80", b"\xe2\x80\xa6", b"\xf0\x9f\x99", b"\xf0\x9f", b"\xef\xbf\xbd"]  # …, emoji; U+FFFD itself
    continue_ = [
        b"\xe6",
        b"\xe6\x9d",
        b"\xe6\x9d\xb1",
        b"\xc3",
        b"\xd8",
        b"\x9d",
        b"\xb1\x20",
        b"\xf1\x80",
        b"\xed\xa0",
    ]
    tokens = [spelled(data) for data in [*begin, *continue_]]
    assert chosen(byte_level(tokens), tokens) == {spelled(data) for data in begin}
    majority = [unicodedata.category(chr(code))[0] in "LN" for code in range(0x6000, 0x7000)]
    assert sum(majority) > len(majority) / 2  # what \xe6 becomes, by another way


def test_sentencepiece_tokens_by_white_space_where_nothing_cuts() -> None:
    """As Llama 2 has it: a normaliser writes ▁, no pre-tokenizer, bytes as a last resort."""
    tokens = ["<unk>", "<s>", "</s>", "<0x0A>", "<0x41>", "<0xE2>", "<0x80>", "▁", "▁the", "▁▁", "the", ".", "1"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>", "<unk>"])
    tokenizer = fast(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    assert chosen(tokenizer, tokens) == {"<unk>", "<s>", "</s>", "<0x0A>", "▁", "▁the", "▁▁"}
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")  # as Gemma has it: it never cuts
    assert chosen(fast(backend), tokens) == {"<unk>", "<s>", "</s>", "<0x0A>", "▁", "▁the", "▁▁"}
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.Metaspace()])
    assert chosen(fast(backend), tokens) == {"<unk>", "<s>", "</s>", "<0x0A>", "▁", "▁the", "▁▁", "."}


def test_wordpiece_and_whole_words() -> None:
    tokens = ["[UNK]", "[SEP]", "the", "##s", "##.", ".", "東", "##東"]
    backend = Tokenizer(models.WordPiece({token: number for number, token in enumerate(tokens)}, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    tokenizer = fast(backend, sep_token="[SEP]")
    assert chosen(tokenizer, tokens) == {"[SEP]", "[UNK]", "the", "##.", ".", "東"}
    words = Tokenizer(models.WordLevel({"the": 0, "cat": 1}, unk_token="the"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert begins_pretoken(fast(words)).all()
    characters = Tokenizer(models.WordLevel({"a": 0, " ": 1, "\n": 2}, unk_token="a"))
    assert begins_pretoken(fast(characters)).tolist() == [False, True, True]


def test_added_tokens_begin_and_numbers_without_a_token_do_not() -> None:
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    tokenizer.add_tokens([AddedToken("letters", special=False), AddedToken("<|im_end|>", special=True)])
    begins_V = begins_pretoken(tokenizer)
    assert len(begins_V) == size + 2 and begins_V[size:].all() and begins_V[tokenizer.eos_token_id]
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 5}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    assert begins_pretoken(fast(backend)).tolist() == [True, False, False, False, False, True]


def test_a_text_is_cut_before_just_these_tokens() -> None:
    """A token of the set does so in a text: it starts a pre-token after a letter."""
    tokenizer = tiny_tokenizer()
    begins_V = begins_pretoken(tokenizer)
    own = tokenizer.backend_tokenizer.pre_tokenizer
    for token, number in tokenizer.get_vocab().items():
        text = tokenizer.convert_tokens_to_string([token])
        if "\ufffd" in text or number == tokenizer.eos_token_id:
            continue
        assert begins_V[number] == (own.pre_tokenize_str("x" + text)[0][0] == "x"), token


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(ModelError, match="slow one"):
        begins_pretoken(ByT5Tokenizer())
