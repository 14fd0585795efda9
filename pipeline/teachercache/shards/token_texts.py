"""Readable texts of tokens, from a tokenizer.json with plain JSON: no torch, no transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from teachercache.errors import CacheDamaged
from teachercache.tokens.token_bytes import BYTE_OF

_BYTE_TOKEN = re.compile(r"<0x([0-7][0-9A-F])>")  # SentencePiece's, as far as the byte is a character by itself


def token_texts(folder: Path) -> dict[int, str]:
    """Token id to readable text; spellings, byte-level (`Ġthe`) or SentencePiece's (`▁the`), are turned back into text.

    Raises `CacheDamaged` for a tokenizer.json that is none.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return {}
    try:
        return _texts(json.loads(path.read_bytes()))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CacheDamaged(f"{path} is no tokenizer ({error}); fetch the cache again") from None


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
    return part.get("type") == "ByteLevel" or any(_has_byte_level(each) for each in inner)


def _byte_level_text(spelling: str) -> str:
    if all(char in BYTE_OF for char in spelling):
        return bytes(BYTE_OF[char] for char in spelling).decode("utf-8", errors="replace")
    return spelling


def _text(spelling: str) -> str:
    byte = _BYTE_TOKEN.fullmatch(spelling)
    return chr(int(byte[1], 16)) if byte else spelling.replace("▁", " ")
