"""The fingerprint of a tokenizer, pinned: whatever version of the library writes a description, it stays the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from cache.golden_caches import GOLDEN, RECIPES
from teachercache.tokens.description import KNOWN, decisive
from teachercache.tokens.fingerprint import saved_fingerprint, tokenizer_fingerprint

from tokenizer_families import REAL

Data = dict[str, Any]

GOLDEN_REAL = {
    "smollm2": "f0e60436c53e58d6ae7fac5e0e2f92c7de5a3a59c0faae393d78fb2c83754746",
    "deepseek": "32f199213744febbe4a2215825c29af65a37d897cb735e4df160cee746ed0fd3",
    "qwen": "008263e54f3dd46c4b22ea284c34637695192deb3693af8783f005e65d6a24ab",
}


def token(number: int, content: str, *, special: bool = True) -> Data:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special, "special": special}
    return {"id": number, "content": content, **flags}


BPE: Data = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [token(0, "<s>"), token(6, "🙂 naïve", special=False)],
    "normalizer": {
        "type": "Sequence",
        "normalizers": [{"type": "NFC"}, {"type": "Replace", "pattern": {"String": "\u200b"}, "content": ""}],
    },
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    },
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3, "Ġ": 4, "Ġa": 5},
        "merges": [["a", "b"], ["Ġ", "a"]],
    },
}
UNIGRAM: Data = {
    "added_tokens": [token(0, "<unk>")],
    "normalizer": {"type": "Prepend", "prepend": "▁"},
    "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
    "post_processor": None,
    "model": {
        "type": "Unigram",
        "unk_id": 0,
        "vocab": [["<unk>", 0.0], ["▁a", -1.5], ["é", -0.1], ["b", -1e-05]],
        "byte_fallback": False,
    },
}
WORD_PIECE: Data = {
    "added_tokens": [token(0, "[UNK]")],
    "normalizer": {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": False,
        "strip_accents": None,
        "lowercase": True,
    },
    "pre_tokenizer": {"type": "BertPreTokenizer"},
    "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 1]},
    "model": {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "##b": 4},
    },
}
SETTINGS: Data = {"bos_token": "<s>", "unk_token": {"content": "<unk>", "lstrip": False}, "eos_token": None}
GOLDEN_SMALL = [
    (BPE, "a121b2f66841360529106772390ee9ebc6d280845ca22c4dd1f1503129f07366"),
    (UNIGRAM, "d8171b787349c0c7312dcc91b95e3cd197f4f8336b0d5499d228c6f2744b0cee"),
    (WORD_PIECE, "661c12deff18e36c7bdcc65582a999ea69bb02e67da38b38ed06082502be223a"),
]


def fingerprint(folder: Path, description: Data, settings: Data = SETTINGS) -> str:
    (folder / "tokenizer.json").write_text(json.dumps(description))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return saved_fingerprint(folder)


def edited(edit: Callable[[Data], Any], description: Data = BPE) -> Data:
    copy: Data = json.loads(json.dumps(description))
    edit(copy)
    return copy


@pytest.mark.parametrize(("description", "expected"), GOLDEN_SMALL, ids=["BPE", "Unigram", "WordPiece"])
def test_small_descriptions_have_their_pinned_fingerprints(tmp_path: Path, description: Data, expected: str) -> None:
    assert fingerprint(tmp_path, description) == expected


@pytest.mark.slow  # qwen's vocabulary takes seconds to convert
@pytest.mark.parametrize("name", GOLDEN_REAL)
def test_real_tokenizers_have_their_pinned_fingerprints(tmp_path: Path, name: str) -> None:
    tokenizer = REAL[name]()
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(tokenizer) == saved_fingerprint(tmp_path) == GOLDEN_REAL[name]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_files_in_a_cache_have_the_fingerprint_that_its_manifest_says(version: str) -> None:
    for name in RECIPES:
        manifest = json.loads((GOLDEN / version / name / "manifest.json").read_text())
        said = manifest.get("settings", manifest)["tokenizer"]["fingerprint"]
        assert saved_fingerprint(GOLDEN / version / name / "teacher") == said


def reversed_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reversed_keys(each) for key, each in reversed(value.items())}
    return [reversed_keys(each) for each in value] if isinstance(value, list) else value


def saying_nothing(description: Data) -> None:
    objects = [description["model"], *description["added_tokens"], *description["normalizer"]["normalizers"]]
    for number, each in enumerate([*objects, description["pre_tokenizer"], description["normalizer"]]):
        each["of a later version"] = [None, False, "", [], {}][number % 5]


def without_defaults(description: Data) -> None:
    for name in ("dropout", "unk_token", "fuse_unk", "byte_fallback", "ignore_merges", "end_of_word_suffix"):
        del description["model"][name]
    del description["pre_tokenizer"]["use_regex"], description["pre_tokenizer"]["trim_offsets"]
    for each in description["added_tokens"]:
        del each["lstrip"], each["single_word"]


SAME: dict[str, Callable[[Data], Any]] = {
    "members that a later version adds and that say nothing": saying_nothing,
    "defaults that are left out": without_defaults,
    "merges as text": lambda d: d["model"].update(merges=["a b", "Ġ a"]),
    "added tokens in another order": lambda d: d["added_tokens"].reverse(),
    "padding, truncation, decoder, version": lambda d: d.update(
        padding={"pad_id": 0}, truncation={"max_length": 9}, decoder=None, version="2.0"
    ),
    "the order of a vocabulary": lambda d: d["model"].update(vocab=reversed_keys(d["model"]["vocab"])),
}
OTHER: dict[str, Callable[[Data], Any]] = {
    "two swapped ids": lambda d: d["model"]["vocab"].update(a=2, b=1),
    "another normaliser": lambda d: d["normalizer"]["normalizers"][0].update(type="NFKC"),
    "normalisers in another order": lambda d: d["normalizer"]["normalizers"].reverse(),
    "no normaliser": lambda d: d.update(normalizer=None),
    "merges in another order": lambda d: d["model"]["merges"].reverse(),
    "a default that is changed": lambda d: d["model"].update(ignore_merges=True),
    "a space before every text": lambda d: d["pre_tokenizer"].update(add_prefix_space=True),
    "what replaces": lambda d: d["normalizer"]["normalizers"][1].update(content=" "),
    "an unknown member that says something": lambda d: d["model"].update(later=0),
    "an added token that is cut off elsewhere": lambda d: d["added_tokens"][1].update(lstrip=True),
    "another beginning": lambda d: d.update(post_processor=None),
}


@pytest.mark.parametrize("name", SAME)
def test_what_changes_no_id_changes_no_fingerprint(tmp_path: Path, name: str) -> None:
    assert fingerprint(tmp_path, edited(SAME[name])) == fingerprint(tmp_path, BPE)


def test_the_order_of_keys_does_not_count(tmp_path: Path) -> None:
    for description, expected in GOLDEN_SMALL:
        assert fingerprint(tmp_path, reversed_keys(description), reversed_keys(SETTINGS)) == expected


@pytest.mark.parametrize("name", OTHER)
def test_what_changes_ids_changes_the_fingerprint(tmp_path: Path, name: str) -> None:
    assert fingerprint(tmp_path, edited(OTHER[name])) != fingerprint(tmp_path, BPE)


@pytest.mark.parametrize("settings", [{**SETTINGS, "bos_token": "a"}, {**SETTINGS, "split_special_tokens": True}])
def test_settings_beside_the_description_count(tmp_path: Path, settings: Data) -> None:
    assert fingerprint(tmp_path, BPE, settings) != fingerprint(tmp_path, BPE)


STEPS: list[tuple[str, Any]] = [
    *(("model", made) for made in (models.BPE(), models.WordPiece(), models.WordLevel({"a": 0}, "a"))),
    ("model", models.Unigram([("a", -1.5)], 0)),
    *(("normalizer", made) for made in (normalizers.BertNormalizer(), normalizers.Strip(), normalizers.NFC())),
    *(("normalizer", made) for made in (normalizers.Replace("a", ""), normalizers.Prepend(""))),
    ("normalizer", normalizers.Sequence([])),
    ("normalizer", normalizers.ByteLevel()),
    *(("pre_tokenizer", made) for made in (pre_tokenizers.ByteLevel(), pre_tokenizers.Metaspace())),
    *(("pre_tokenizer", made) for made in (pre_tokenizers.Punctuation(), pre_tokenizers.Digits())),
    *(("pre_tokenizer", made) for made in (pre_tokenizers.Whitespace(), pre_tokenizers.BertPreTokenizer())),
    ("pre_tokenizer", pre_tokenizers.Split(Regex("a"), "isolated")),
    ("pre_tokenizer", pre_tokenizers.CharDelimiterSplit("a")),
    ("pre_tokenizer", pre_tokenizers.FixedLength(2)),
    ("pre_tokenizer", pre_tokenizers.Sequence([])),
    ("post_processor", processors.ByteLevel()),
    ("post_processor", processors.BertProcessing(("s", 1), ("c", 2))),
    ("post_processor", processors.RobertaProcessing(("s", 1), ("c", 2))),
    ("post_processor", processors.TemplateProcessing(single="$A")),
    ("post_processor", processors.Sequence([])),
]


@pytest.mark.parametrize(("name", "step"), STEPS, ids=[type(step).__name__ for _, step in STEPS])
def test_every_member_that_the_library_writes_is_known_with_its_default(name: str, step: Any) -> None:
    backend = Tokenizer(models.BPE())
    setattr(backend, name, step)
    written = json.loads(backend.to_str())[name]
    assert set(written) - {"type"} == set(KNOWN[name].get(written["type"], {}))
    assert decisive(json.loads(backend.to_str()))[name] == written


@pytest.mark.parametrize(("name", "step"), STEPS, ids=[type(step).__name__ for _, step in STEPS])
def test_defaults_are_those_of_the_library(name: str, step: Any) -> None:
    backend = Tokenizer(models.BPE())
    setattr(backend, name, step)
    described = json.loads(backend.to_str())
    for member in set(described[name]) - {"type"}:
        without = edited(lambda data, member=member: data[name].pop(member), described)
        filled = decisive(without)[name]
        try:
            read = json.loads(Tokenizer.from_str(json.dumps(without)).to_str())[name]
        except Exception:  # the library asks for it
            continue
        assert read == filled or read["type"] != filled["type"]  # else another step of its own
