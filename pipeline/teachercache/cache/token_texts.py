"""Readable texts of tokens, from a tokenizer.json with plain JSON: no torch, no transformers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from teachercache.bounded.strangers_json import parse_json
from teachercache.cache.files.entries import FileInfo
from teachercache.cache.storage.source import MOST_TOKENIZER_BYTES, Source, read_checked
from teachercache.errors import CacheDamaged
from teachercache.tokens.claims import MOST_VALUES
from teachercache.tokens.token_bytes import BYTE_OF

_BYTE_TOKEN = re.compile(r"<0x([0-7][0-9A-F])>")  # SentencePiece's, as far as the byte is a character by itself


def listed_token_texts(source: Source, infos: Sequence[FileInfo], *, within: str) -> dict[int, str]:
    """`token_texts` of the tokenizer.json among the files of a cache's folder; nothing where there is none."""
    for info in infos:
        if info.file == f"{within}/tokenizer.json":
            return token_texts(read_checked(source, info, most=MOST_TOKENIZER_BYTES), name=source.name_of(info))
    return {}


def token_texts(data: bytes, *, name: str) -> dict[int, str]:
    """Token id to readable text; spellings, byte-level (`Ġthe`) or SentencePiece's (`▁the`), are turned back into text.

    `data` is a tokenizer.json, which messages call `name`. Raises `CacheDamaged` for one that is none.
    """
    try:
        return _texts(parse_json(data, most=MOST_VALUES))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CacheDamaged(f"{name} is no tokenizer ({error}); fetch the cache again") from None


def _texts(data: dict[str, Any]) -> dict[int, str]:
    vocabulary = data["model"].get("vocab", {})
    pairs = (
        vocabulary.items() if isinstance(vocabulary, dict) else ((entry[0], i) for i, entry in enumerate(vocabulary))
    )
    readable = _byte_level_text if any(_has_byte_level(data.get(k)) for k in ("decoder", "pre_tokenizer")) else _text
    texts = {token: readable(spelling) for spelling, token in pairs}
    texts.update({token["id"]: token["content"] for token in data.get("added_tokens", [])})
    return texts


def _has_byte_level(part: dict[str, Any] | None) -> bool:
    if part is None:
        return False
    inner = [*part.get("decoders", []), *part.get("pretokenizers", [])]
    return part.get("type") == "ByteLevel" or any(_has_byte_level(inner_part) for inner_part in inner)


def _byte_level_text(spelling: str) -> str:
    if all(char in BYTE_OF for char in spelling):
        return bytes(BYTE_OF[char] for char in spelling).decode("utf-8", errors="replace")
    return spelling


def _text(spelling: str) -> str:
    byte = _BYTE_TOKEN.fullmatch(spelling)
    return chr(int(byte[1], 16)) if byte else spelling.replace("▁", " ")
