"""The part of a tokenizer's description (`tokenizer.json`) that decides text -> ids, in one form whatever version wrote
it.

Versions of the tokenizers library add members with defaults, leave some out, and write merges in two ways. So a member that
is known here is always there, filled with its default; one that is unknown and says nothing (null, false, "", [] or {}) is
dropped; any other one is kept, for it may change ids. FORMAT.md, "Fingerprint of a tokenizer", states the same for readers
in other languages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What decides. Left out: padding and truncation (state of the last call), the decoder (ids -> text), the file's version.
_STEPS = ("model", "normalizer", "pre_tokenizer", "post_processor")
_REQUIRED = object()  # a member without a default: every version writes it
_Members = Mapping[str, Any]

_BYTE_LEVEL: _Members = {"add_prefix_space": True, "trim_offsets": True, "use_regex": True}
_PAIR: _Members = {"sep": _REQUIRED, "cls": _REQUIRED}
_ADDED_TOKEN: _Members = {
    **dict.fromkeys(("id", "content", "normalized", "special"), _REQUIRED),
    **dict.fromkeys(("single_word", "lstrip", "rstrip"), False),
}
KNOWN: Mapping[str, Mapping[str, _Members]] = {
    "model": {
        "BPE": {
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": _REQUIRED,
            "merges": _REQUIRED,
        },
        "WordPiece": {
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": _REQUIRED,
        },
        "WordLevel": {"unk_token": "<unk>", "vocab": _REQUIRED},
        "Unigram": {"unk_id": None, "byte_fallback": False, "vocab": _REQUIRED},
    },
    "normalizer": {
        "BertNormalizer": {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True},
        "Strip": {"strip_left": True, "strip_right": True},
        "Replace": {"pattern": _REQUIRED, "content": _REQUIRED},
        "Prepend": {"prepend": _REQUIRED},
        "Precompiled": {"precompiled_charsmap": _REQUIRED},
        "Sequence": {"normalizers": _REQUIRED},
    },
    "pre_tokenizer": {
        "ByteLevel": _BYTE_LEVEL,
        "Metaspace": {"replacement": "▁", "prepend_scheme": "always", "split": True},
        "Split": {"pattern": _REQUIRED, "behavior": _REQUIRED, "invert": False},
        "Punctuation": {"behavior": "Isolated"},
        "Digits": {"individual_digits": False},
        "CharDelimiterSplit": {"delimiter": _REQUIRED},
        "FixedLength": {"length": 5},
        "Sequence": {"pretokenizers": _REQUIRED},
    },
    "post_processor": {
        "ByteLevel": _BYTE_LEVEL,
        "BertProcessing": _PAIR,
        "RobertaProcessing": {**_PAIR, **dict.fromkeys(("trim_offsets", "add_prefix_space"), _REQUIRED)},
        "TemplateProcessing": dict.fromkeys(("single", "pair", "special_tokens"), _REQUIRED),
        "Sequence": {"processors": _REQUIRED},
    },
}
_PARTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}


def decisive(description: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of a `tokenizer.json` that decides ids. Order is kept where it matters (merges, steps of a
    sequence, scored vocabularies); added tokens stand in the order of their ids."""
    added = sorted(description.get("added_tokens") or [], key=lambda token: token["id"])
    steps = {name: _step(name, description.get(name)) for name in _STEPS}
    return {"added_tokens": [_members(token, _ADDED_TOKEN) for token in added], **steps}


def _step(name: str, step: Any) -> Any:
    """A model, normaliser, pre-tokeniser or post-processor, with all that it consists of; None for none."""
    if step is None:
        return None
    members = _members(step, {"type": _REQUIRED, **KNOWN[name].get(step.get("type"), {})})
    parts = _PARTS.get(name)
    if step.get("type") == "Sequence" and parts in members:
        members[parts] = [_step(name, part) for part in members[parts]]
    if members.get("merges") is not None:
        members["merges"] = [pair.split(" ") if isinstance(pair, str) else list(pair) for pair in members["merges"]]
    return members


def _members(written: Mapping[str, Any], known: _Members) -> dict[str, Any]:
    """Returns an object's known members, filled with their defaults, and its unknown ones that say something."""
    defaults = {key: value for key, value in known.items() if value is not _REQUIRED}
    kept = {key: value for key, value in written.items() if key in known or not _says_nothing(value)}
    return {**defaults, **kept}


def _says_nothing(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})
