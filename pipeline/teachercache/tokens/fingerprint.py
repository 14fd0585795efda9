"""Fingerprints that say whether two tokenizers turn every text into the same ids."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from teachercache.errors import ModelError

# What of a tokenizer.json decides text -> ids. Left out: padding and truncation (state of the last call), the decoder
# (ids -> text), the version of the file format.
_DECISIVE = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "model")


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256, 64 hex digits, over vocabulary, merges, normalisation, added and special tokens.

    Equal for a tokenizer and its saved and reloaded copy, whatever its name, padding, truncation or chat template (see
    `template_fingerprint`). Raises `ModelError` for a tokenizer without a fast backend.
    """
    description = json.loads(require_fast(tokenizer).backend_tokenizer.to_str())
    decisive: dict[str, Any] = {key: description.get(key) for key in _DECISIVE}
    decisive["added_tokens"] = sorted(decisive["added_tokens"] or [], key=lambda token: token["id"])
    decisive["model"] = _canonical_model(decisive["model"])
    decisive["split_special_tokens"] = bool(getattr(tokenizer, "split_special_tokens", False))
    decisive["begin_end_unknown"] = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    return _sha256(decisive)


def template_fingerprint(tokenizer: Any) -> str | None:
    """SHA-256 of the chat template, which decides how conversations become text; None when there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return _sha256(template) if template else None


def vocabulary_size(tokenizer: Any) -> int:
    """Highest token id + 1, added tokens included. A model's output may be wider: padded rows have no token."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def require_fast(tokenizer: Any) -> Any:
    """The tokenizer itself. Raises `ModelError` when it has no fast backend: only those report character offsets."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"tokenizer {type(tokenizer).__name__} is a slow one, without character offsets; "
            "convert it: AutoTokenizer.from_pretrained(...) must give a tokenizer with a tokenizer.json"
        )
    return tokenizer


def _canonical_model(model: dict[str, Any]) -> dict[str, Any]:
    """Merges as pairs: versions of tokenizers write them as "a b" or as ["a", "b"]."""
    merges = model.get("merges")
    if merges is None:
        return model
    return {**model, "merges": [pair.split(" ") if isinstance(pair, str) else list(pair) for pair in merges]}


def _sha256(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()
