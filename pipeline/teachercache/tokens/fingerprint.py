"""Fingerprints that say whether two tokenizers turn every text into the same ids."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teachercache.errors import ModelError
from teachercache.tokens.claims import CONFIG, DESCRIPTION
from teachercache.tokens.description import decisive

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMED = ("bos_token", "eos_token", "unk_token")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256, 64 hex digits, over vocabulary, merges, normalisation, added and special tokens.

    Equal for a tokenizer and its saved and reloaded copy, whatever its name, padding, truncation or chat template (see
    `template_fingerprint`), and whatever version of the library writes it (`description`). Raises `ModelError` for a
    tokenizer without a fast backend.
    """
    description = json.loads(require_fast(tokenizer).backend_tokenizer.to_str())
    named = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    return _of_description(description, getattr(tokenizer, "split_special_tokens", False), named)


def saved_fingerprint(folder: Path) -> str:
    """The same of a saved tokenizer, from what its two files say: no version of the library can read another one into them.

    Raises `ValueError`, `KeyError`, `TypeError` or `AttributeError` for files that describe none.
    """
    return _of_files(folder, json.loads((folder / DESCRIPTION).read_bytes()))


def read_fingerprint(folder: Path) -> str:
    """The same of a saved tokenizer as this version of the tokenizers library reads it, from what its two files say: what
    `tokenizer_fingerprint` gives of one that was loaded from them, unless its class makes another one of them.

    Raises as `saved_fingerprint`, and what the library raises.
    """
    from tokenizers import Tokenizer

    return _of_files(folder, json.loads(Tokenizer.from_file(str(folder / DESCRIPTION)).to_str()))


def _of_files(folder: Path, description: dict[str, Any]) -> str:
    settings = json.loads((folder / CONFIG).read_bytes()) if (folder / CONFIG).is_file() else {}
    ids = _ids_of(description)
    unknown = ids.get(_content(settings.get("unk_token")))
    tokens = [_content(settings.get(name)) for name in _NAMED]
    named = [None if token is None else ids.get(token, unknown) for token in tokens]
    return _of_description(description, settings.get("split_special_tokens", False), named)


def _of_description(description: dict[str, Any], split_special_tokens: Any, named: list[int | None]) -> str:
    further = {"split_special_tokens": bool(split_special_tokens), "begin_end_unknown": named}
    return _sha256({**decisive(description), **further})


def _ids_of(description: dict[str, Any]) -> dict[str | None, int]:
    """Token to id: of added tokens, and of the model's vocabulary, which may be a list in the order of ids."""
    listed = description["model"]["vocab"]
    vocabulary: dict[str | None, int] = (
        {token: number for number, (token, _) in enumerate(listed)} if isinstance(listed, list) else listed
    )
    return vocabulary | {token["content"]: token["id"] for token in description.get("added_tokens") or []}


def _content(token: Any) -> str | None:
    """Returns the text of a token in a tokenizer's settings, which hold the text itself or an object with it."""
    text: str | None = token["content"] if isinstance(token, dict) else token
    return text


def template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """SHA-256 of the chat template, which decides how conversations become text; None when there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return _sha256(template) if template else None


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Highest token id + 1, added tokens included. A model's output may be wider: padded rows have no token."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def require_fast(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The tokenizer itself. Raises `ModelError` when it has no fast backend: only those report character offsets."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"tokenizer {type(tokenizer).__name__} is a slow one, without character offsets; "
            "convert it: AutoTokenizer.from_pretrained(...) must give a tokenizer with a tokenizer.json"
        )
    return tokenizer


def _sha256(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()
