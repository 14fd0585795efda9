"""The bytes that each token of a vocabulary stands for.

A vocabulary writes bytes in one of three ways. *Byte-level*: one printable character a byte (GPT-2, Llama 3, Qwen,
tiktoken vocabularies as transformers converts them). *Byte-fallback*: SentencePiece's text with ▁ for a space, and
<0xE2> for single bytes. *Text*: pieces of words, with no record of the white space between them (WordPiece).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from teachercache.tokens.fingerprint import require_fast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PARTS = ("normalizers", "pretokenizers", "decoders")


@dataclass(frozen=True, eq=False)
class TokenBytes:
    """Bytes of one fast tokenizer's tokens, built once; a few MB for 150k tokens, and it can be pickled.

    `values[i]` are the bytes of token i as it continues a text: b"" for special tokens, None where they are not defined
    (an unknown token, an id without a token). `contents` are the same, with special tokens as they are written.
    """

    family: str  # "byte-level", "byte-fallback" or "text"
    values: list[bytes | None]  # [V]
    contents: list[bytes | None]  # [V]
    special_V: NDArray[np.bool_]  # stand for no text unless the text spells them out
    begins_V: NDArray[np.bool_]  # begin a word, after white space that is not in their bytes (WordPiece)
    lengths_V: NDArray[np.int64]  # bytes of each value, -1 where undefined

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
        """Read from the tokenizer's own description. Raises `ModelError` for a tokenizer without a fast backend."""
        description = json.loads(require_fast(tokenizer).backend_tokenizer.to_str())
        decode = _Decoder(description)
        added = {token["id"]: token for token in description["added_tokens"] or []}
        vocabulary = tokenizer.get_vocab()
        size = max(vocabulary.values(), default=-1) + 1
        values: list[bytes | None] = [None] * size
        begins_V = np.zeros(size, dtype=np.bool_)
        for token, index in vocabulary.items():
            values[index] = decode.added(token) if index in added else decode.token(token)
            begins_V[index] = decode.begins_word(token)
        contents = list(values)
        special = {index for index, token in added.items() if token["special"]} | set(tokenizer.all_special_ids)
        special_V = np.isin(np.arange(size), list(special))
        unknown = decode.unknown(tokenizer)
        for index in np.flatnonzero(special_V).tolist():
            if index in added:
                contents[index] = added[index]["content"].encode()
            values[index] = None if index == unknown else b""
        lengths_V = np.array([-1 if value is None else len(value) for value in values], dtype=np.int64)
        return cls(decode.family, values, contents, special_V, begins_V & ~special_V, lengths_V)

    @property
    def size(self) -> int:
        """Highest token id + 1."""
        return len(self.values)


class _Decoder:
    """Decodes bytes as a tokenizer.json writes them."""

    def __init__(self, description: dict[str, Any]) -> None:
        self.model = description["model"]
        parts = [part for key in ("normalizer", "pre_tokenizer", "decoder") for part in _flat(description.get(key))]
        self.space = next((symbol for symbol in map(_space_symbol, parts) if symbol), None)
        self.prefix: str = self.model.get("continuing_subword_prefix") or ""
        self.suffix: str = self.model.get("end_of_word_suffix") or ""
        self.family = "text"
        if any(part["type"] == "ByteLevel" for part in parts):
            self.family = "byte-level"
        elif self.space or self.model.get("byte_fallback") or any(part["type"] == "ByteFallback" for part in parts):
            self.family = "byte-fallback"
        vocabulary = self.model.get("vocab") or {}
        self.known = set(vocabulary) if isinstance(vocabulary, dict) else {token for token, _ in vocabulary}

    def added(self, content: str) -> bytes | None:
        """Returns the bytes of an added token. SentencePiece's user-defined symbols are part of the model too, and
        write ▁ for a space."""
        return self.token(content) if self.family == "byte-fallback" and content in self.known else content.encode()

    def token(self, token: str) -> bytes | None:
        if self.family == "byte-level":
            try:
                return token.translate(_LATIN_1).encode("latin-1")
            except (
                UnicodeEncodeError
            ):  # as the decoder does it: a token with any other character stands for its own text
                return token.encode()
        if self.family == "byte-fallback":
            if match := _BYTE.fullmatch(token):
                return bytes([int(match[1], 16)])
            return (token.replace(self.space, " ") if self.space else token).encode()
        if self.prefix:
            token = token.removeprefix(self.prefix) or token
        if self.suffix:
            token = token.removesuffix(self.suffix) or token
        return token.encode()

    def begins_word(self, token: str) -> bool:
        return self.family == "text" and bool(self.prefix) and not token.startswith(self.prefix)

    def unknown(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """The token that stands for whatever the vocabulary lacks; byte-level vocabularies lack nothing."""
        if self.family == "byte-level":
            return None
        token = self.model.get("unk_token")
        index: Any = self.model.get("unk_id") if token is None else tokenizer.convert_tokens_to_ids(token)
        return None if index is None else int(index)


def _flat(node: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if node is None:
        return
    yield node
    for name in _PARTS:
        for part in node.get(name) or []:
            yield from _flat(part)


def _space_symbol(part: dict[str, Any]) -> str | None:
    """Returns the symbol that a part writes for a space, or reads as one."""
    symbol: str | None = part.get("replacement")
    if part["type"] == "Metaspace":
        return symbol or "▁"
    if part["type"] == "Replace":
        pattern: str | None = (part.get("pattern") or {}).get("String")
        content: str | None = part.get("content")
        if pattern == " " and content and content != " ":
            return content
        if content == " " and pattern == "▁":
            return pattern
    return None


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table (Radford et al., 2019): printable Latin-1 characters stand for themselves, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + order): byte for order, byte in enumerate(others)}


BYTE_OF = _byte_of_character()
_LATIN_1 = dict.fromkeys(range(256), "\uffff") | {ord(char): chr(byte) for char, byte in BYTE_OF.items()}
CHARACTER_OF = {byte: char for char, byte in BYTE_OF.items()}
