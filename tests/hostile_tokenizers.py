"""Tokenizer files that would take memory or time, or name what is not theirs: edits of their JSON."""

from __future__ import annotations

import base64
from typing import Any


def _vocabulary(data: dict[str, Any]) -> dict[str, Any]:
    return data["model"]["vocab"]


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(parts: list[Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": parts}


def precompiled(text: str) -> dict[str, Any]:
    """A map of SentencePiece that has this text in it, for no character."""
    data = (0).to_bytes(4, "little") + text.encode() + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = sequence([value])
    return value


DESCRIPTIONS: dict[str, Any] = {
    "an id of 2^31": lambda data: _vocabulary(data).update({"x": 2**31}),
    "an id of 2^32 - 1": lambda data: _vocabulary(data).update({"x": 2**32 - 1}),
    "an id of 2^70": lambda data: _vocabulary(data).update({"x": 2**70}),
    "a negative id": lambda data: _vocabulary(data).update({"x": -1}),
    "an id in words": lambda data: _vocabulary(data).update({"x": "12"}),
    "half an id": lambda data: _vocabulary(data).update({"x": 1.5}),
    "an id that is true": lambda data: _vocabulary(data).update({"x": True}),
    "an id beyond the vocabulary": lambda data: _vocabulary(data).update({"x": 300}),
    "an added id of 2^31": lambda data: data["added_tokens"][0].update(id=2**31),
    "no added id": lambda data: data["added_tokens"][0].pop("id"),
    "added tokens in words": lambda data: data.update(added_tokens="all"),
    "no model": lambda data: data.pop("model"),
    "a list": None,
    "a model of a later kind": lambda data: data["model"].update(type="Future"),
    "merges of nothing": lambda data: data["model"].update(merges=["no such tokens"]),
    "no vocabulary": lambda data: data["model"].update(vocab={}),
    "an unknown pre-tokenizer": lambda data: data.update(pre_tokenizer={"type": "Shell", "command": "id"}),
    "a pattern that is none": lambda data: data.update(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "(" * 50}, "behavior": "Isolated", "invert": False}
    ),
    "a normaliser that is none": lambda data: data.update(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "AAA="}
    ),
    "a charsmap that claims much": lambda data: data.update(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "/////w=="}
    ),
    "a template that lacks its token": lambda data: data.update(
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    ),
    "pieces of no length": lambda data: data.update(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "forty rules that double a text": lambda data: data.update(
        normalizer=sequence([replace({"String": "a"}, "aa")] * 40)
    ),
    "sequences of sequences": lambda data: data.update(
        normalizer=sequence([sequence([replace({"Regex": "(?=q)"}, "qq" * 99)] * 2)] * 2)
    ),
    "a hundred components": lambda data: data.update(normalizer=sequence([{"type": "NFC"}] * 100)),
    "a rule that puts megabytes": lambda data: data.update(normalizer=replace({"String": "a"}, "b" * 2**21)),
    "megabytes before a text": lambda data: data.update(normalizer={"type": "Prepend", "prepend": "b" * 2**21}),
    "a map that doubles often": lambda data: data.update(normalizer=sequence([precompiled("b" * 200)] * 2)),
    "an unknown normaliser": lambda data: data.update(normalizer={"type": "Shell"}),
    "an unknown decoder": lambda data: data.update(decoder={"type": "Shell"}),
    "decoders that double": lambda data: data.update(
        decoder={"type": "Sequence", "decoders": [replace({"String": "a"}, "aa")] * 40}
    ),
    "an added token of megabytes": lambda data: data["added_tokens"][0].update(content="a" * 2**21),
    "a token of megabytes": lambda data: _vocabulary(data).update({"a" * 2**21: 299}),
    "a text between two tokens of 2^31": lambda data: data.update(
        post_processor={
            "type": "RobertaProcessing",
            "sep": ["a", 2**31],
            "cls": ["a", 2**31],
            "trim_offsets": True,
            "add_prefix_space": False,
        }
    ),
    "a million tokens after a text": lambda data: data.update(
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"x": {"id": "x", "ids": [1] * 2**20, "tokens": ["x"] * 2**20}},
        }
    ),
    "texts padded to a billion tokens": lambda data: data.update(
        padding={
            "strategy": {"Fixed": 10**9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "a",
        }
    ),
    "a pattern that is tried in every way": lambda data: data.update(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    ),
    "a pattern of megabytes": lambda data: data.update(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "a|" * 2**20}, "behavior": "Isolated", "invert": False}
    ),
    "lists without end": lambda data: data.update(normalizer=[[]] * 2**22),
    "lists in lists": lambda data: data.update(normalizer=nested(200)),
    "something for nothing": lambda data: data.update(
        normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "xx"}
    ),
}

CONFIGS: dict[str, dict[str, Any]] = {
    "an added id of 2^31": {"added_tokens_decoder": {"2147483648": {"content": "x", "special": True}}},
    "an added id in words": {"added_tokens_decoder": {"many": {"content": "x"}}},
    "code of its own": {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"},
    "another class": {"tokenizer_class": "../../etc/passwd"},
    "a file of its own": {"tokenizer_file": "/dev/zero"},
    "a vocabulary of its own": {"vocab_file": "/etc/passwd"},
    "another end": {"eos_token": "the"},
    "a token that is one already": {"additional_special_tokens": ["the"]},
    "many special tokens": {"additional_special_tokens": [f"t{n}" for n in range(50_000)]},
    "many further tokens": {"extra_special_tokens": {f"t{n}": f"<t{n}>" for n in range(50_000)}},
    "many tokens with names": {f"t{n}_token": f"<t{n}>" for n in range(50_000)},
    "an added token": {"additional_special_tokens": ["<evil>"]},
}
