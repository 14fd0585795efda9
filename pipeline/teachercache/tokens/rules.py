"""Bounds for what a tokenizer's rules do to a text: checks its description before a library follows it.

Forty rules that double a text are a few bytes in a tokenizer.json, and harmless until the text comes that they are for. So
a description is held against what tokenizers have: components that are known, normalisers that let a text grow by a factor
of `MOST_GROWTH` at most, tokens of some length. Regular expressions are bounded where they run: the library gives a match
up after ten million steps (0.1 s), which ends in an error, and `bounded.try_tokenizer` gives them texts that are hard for
most.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from typing import Any

MOST_GROWTH = 1024  # of a text by normalisers, in bytes; NFKC alone can make 11 of one, a precompiled map 33
MOST_PARTS = 64  # of a sequence of components
MOST_CONTENT = 1024  # bytes that a rule puts into a text
MOST_TOKEN = 2**16  # bytes of a token
MOST_ADDED_TOKEN = 4096  # … that is looked for before all others
MOST_ADDED = 2**22  # bytes of these in all
MOST_PATTERN = 2**14  # characters of a regular expression

_GROWTH = {
    "NFC": 3, "NFD": 4, "NFKC": 11, "NFKD": 18, "BertNormalizer": 6, "Lowercase": 3, "Nmt": 2, "ByteLevel": 2, "Strip": 1,
    "StripAccents": 1, "Prepend": 1,
}  # fmt: skip
_PRE_TOKENIZERS = frozenset({
    "BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Delimiter", "Digits", "FixedLength", "Metaspace", "Punctuation",
    "Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit",
})  # fmt: skip
_DECODERS = frozenset({
    "BPEDecoder", "ByteFallback", "ByteLevel", "CTC", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece",
})  # fmt: skip
_POST_PROCESSORS = frozenset({"BertProcessing", "ByteLevel", "RobertaProcessing", "TemplateProcessing"})
_MODELS = frozenset({"BPE", "Unigram", "WordLevel", "WordPiece"})

Part = dict[str, Any]


def check_rules(description: Part, *, vocabulary_size: int) -> None:
    """Raise `ValueError`, in one line, for a tokenizer.json whose rules could be without bound."""
    try:
        _check_normalizers([*_parts(description.get("normalizer"), "normalizers")])
        for part in _parts(description.get("pre_tokenizer"), "pretokenizers"):
            _check_known(part, _PRE_TOKENIZERS)
            _pattern_growth(part)
        decoders = [*_parts(description.get("decoder"), "decoders")]
        for part in decoders:
            _check_known(part, _DECODERS)
        _check_growth([_pattern_growth(part) for part in decoders])
        for part in _parts(description.get("post_processor"), "processors"):
            _check_known(part, _POST_PROCESSORS)
            _check_ids(part, vocabulary_size)
        _check_model(description["model"])
        _check_added(description.get("added_tokens") or [])
        _check_padding(description.get("padding") or {})
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"tokenizer.json describes no tokenizer ({str(error)[:100]})") from None


def _parts(component: Part | None, key: str) -> Iterator[Part]:
    """A component, or those of a sequence, however they are nested."""
    parts: list[Part] = []
    left = [] if component is None else [component]
    while left:
        part = left.pop()
        if part.get("type") == "Sequence":
            left += part[key]
        else:
            parts.append(part)
        if len(parts) + len(left) > MOST_PARTS:
            raise ValueError(f"a sequence of {key} has more than {MOST_PARTS} parts")
    return iter(parts)


def _check_known(part: Part, known: frozenset[str]) -> None:
    if part.get("type") not in known:
        raise ValueError(f"its component {str(part.get('type'))[:40]!r} is not known")


def _check_normalizers(parts: list[Part]) -> None:
    growth = []
    for part in parts:
        _check_known(part, frozenset({*_GROWTH, "Replace", "Precompiled"}))
        _check_content(part.get("prepend") or "")
        growth.append(_GROWTH.get(part["type"], 1) * _pattern_growth(part) * _map_growth(part))
    _check_growth(growth)


def _check_growth(growth: list[int]) -> None:
    total = 1
    for factor in growth:
        total *= factor
        if total > MOST_GROWTH:
            raise ValueError(f"its rules can make a text more than {MOST_GROWTH} times as long")


def _pattern_growth(part: Part) -> int:
    """Returns the factor by which a replacement can lengthen a text at most; 1 for other components."""
    pattern = part.get("pattern")
    if pattern is None:
        return 1
    content = _check_content(part.get("content") or "") if part["type"] == "Replace" else 0
    if "Regex" in pattern:
        if len(pattern["Regex"]) > MOST_PATTERN:
            raise ValueError(f"a regular expression has more than {MOST_PATTERN} characters")
        return content + 1  # where it matches nothing, something stands between all characters
    size = len(pattern["String"].encode())
    if part["type"] == "Replace" and not size:
        raise ValueError("it replaces nothing by something")
    return max(1, -(-content // max(1, size)))


def _check_content(content: str) -> int:
    size = len(content.encode())
    if size > MOST_CONTENT:
        raise ValueError(f"a rule puts {size} bytes into a text, at most {MOST_CONTENT} are possible")
    return size


def _map_growth(part: Part) -> int:
    """The longest text that a precompiled map of SentencePiece has for a character."""
    if part["type"] != "Precompiled":
        return 1
    try:
        data = base64.b64decode(part["precompiled_charsmap"] or "", validate=True)
    except binascii.Error:
        raise ValueError("its precompiled map is no base64") from None
    trie = int.from_bytes(data[:4], "little")
    return max(1, *map(len, data[4 + trie :].split(b"\0")))


def _check_ids(part: Part, vocabulary_size: int) -> None:
    """Checks that what is put around texts is a few tokens that exist."""
    named = (part.get("special_tokens") or {}).values()
    ids = [token for special in named for token in special["ids"]]
    ids += [part[name][1] for name in ("sep", "cls") if name in part]
    if len(ids) > MOST_PARTS or max(len(part.get(name) or []) for name in ("single", "pair")) > MOST_PARTS:
        raise ValueError(f"it puts more than {MOST_PARTS} tokens around a text")
    for token in ids:
        if type(token) is not int or not 0 <= token < vocabulary_size:
            raise ValueError(f"it puts the token {str(token)[:20]} around a text, of {vocabulary_size} tokens")


def _check_model(model: Part) -> None:
    if "type" in model:  # files of early versions do not say it
        _check_known(model, _MODELS)
    vocabulary = model.get("vocab") or {}
    names = vocabulary if isinstance(vocabulary, dict) else (entry[0] for entry in vocabulary)
    longest = max(map(len, names), default=0)
    if longest > MOST_TOKEN:
        raise ValueError(f"a token has {longest} characters, at most {MOST_TOKEN} are possible")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        _check_content(model.get(name) or "")


def _check_added(tokens: list[Part]) -> None:
    sizes = [len(token["content"].encode(errors="surrogatepass")) for token in tokens]
    if max(sizes, default=0) > MOST_ADDED_TOKEN or sum(sizes) > MOST_ADDED:
        raise ValueError(
            f"added tokens have {max(sizes)} bytes and {sum(sizes)} in all, at most {MOST_ADDED_TOKEN} and {MOST_ADDED} are "
            "possible"
        )


def _check_padding(padding: Part) -> None:
    strategy = padding.get("strategy")
    wanted = [strategy.get("Fixed", 0)] if isinstance(strategy, dict) else []
    if max([*wanted, padding.get("pad_to_multiple_of") or 0]) > 2**20:
        raise ValueError("it pads texts to more than a million tokens")
