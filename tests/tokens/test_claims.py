"""Tokenizer files that would take memory, or end the process: refused before a library reads them."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cache.forgery import sign
from teachercache.bounded.strangers_json import values_of
from teachercache.bounded.tokenizers import try_tokenizer
from teachercache.cache import Cache
from teachercache.errors import CacheDamaged, ModelError
from teachercache.models.loading import load_tokenizer
from teachercache.stream.tokenizers import teacher_tokenizer
from teachercache.tokens.claims import MOST_VALUES
from teachercache.tokens.rules import check_rules

from builders import tiny_cache
from tokenizer_families import REAL, SMALL


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cache(tmp_path_factory.mktemp("made"))


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "cache"))


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


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_descriptions_that_lie_are_refused(cache: Path, name: str) -> None:
    path = cache / "teacher" / "tokenizer.json"
    data, edit = json.loads(path.read_text()), DESCRIPTIONS[name]
    if edit is None:
        data = [data]
    else:
        edit(data)
    path.write_text(json.dumps(data))
    sign(cache)
    with pytest.raises(CacheDamaged, match="fetch the cache again") as caught:
        teacher_tokenizer(Cache.open(cache))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


CONFIGS: dict[str, dict[str, Any]] = {
    "an added id of 2^31": {"added_tokens_decoder": {"2147483648": {"content": "x", "special": True}}},
    "an added id in words": {"added_tokens_decoder": {"many": {"content": "x"}}},
    "code of its own": {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"},
    "another class": {"tokenizer_class": "../../etc/passwd"},
    "a file of its own": {"tokenizer_file": "/dev/zero"},
    "a vocabulary of its own": {"vocab_file": "/etc/passwd"},
    "another end": {"eos_token": "the"},
    "an added token": {"additional_special_tokens": ["<evil>"]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_that_lie_are_refused_or_change_nothing(cache: Path, name: str) -> None:
    path = cache / "teacher" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **CONFIGS[name]}))
    (cache / "teacher" / "evil.py").write_text(f"open({str(cache / 'ran')!r}, 'w')\n")
    sign(cache, lambda data: data["files"].append({"file": "teacher/evil.py", "bytes": 0, "sha256": ""}))
    try:
        tokenizer = teacher_tokenizer(Cache.open(cache))
    except CacheDamaged as error:
        assert "\n" not in str(error)
    else:
        assert len(tokenizer) == 300
    assert not (cache / "ran").exists(), "nothing is executed"


def test_a_cache_without_a_description_of_its_tokenizer_is_refused(cache: Path) -> None:
    sign(cache, lambda data: data.update(files=[f for f in data["files"] if "tokenizer.json" not in f["file"]]))
    with pytest.raises(CacheDamaged, match=r"there is no tokenizer\.json"):
        teacher_tokenizer(Cache.open(cache))


def test_large_tokenizer_files_are_refused(cache: Path) -> None:
    with (cache / "teacher" / "tokenizer.json").open("wb") as stream:
        stream.truncate(2**40)
    sign_large = lambda data: [f.update(bytes=2**40) for f in data["files"] if "tokenizer.json" in f["file"]]  # noqa: E731
    (cache / "teacher" / "tokenizer.json").rename(cache / "aside")
    sign(cache, sign_large)
    (cache / "aside").rename(cache / "teacher" / "tokenizer.json")
    with pytest.raises(CacheDamaged, match=r"at most 67108864 are possible"):
        teacher_tokenizer(Cache.open(cache))


def test_a_panic_of_the_library_is_an_error_of_one_line(cache: Path, tmp_path: Path) -> None:
    """What Rust raises where it gives up is no `Exception`."""
    folder = Path(shutil.copytree(cache / "teacher", tmp_path / "teacher"))
    data = json.loads((folder / "tokenizer.json").read_text())
    data["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "/////w=="}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ModelError) as caught:
        load_tokenizer(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "family", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in ("smollm2", "deepseek", "qwen"))]
)
def test_tokenizers_of_every_family_are_taken(family: str) -> None:
    text = {**SMALL, **REAL}[family]().backend_tokenizer.to_str()
    check_rules(json.loads(text), vocabulary_size=2**20)
    if family in SMALL:
        try_tokenizer(text.encode())
    assert values_of(text.encode()) < MOST_VALUES // 3


def test_a_tokenizer_that_takes_too_much_is_given_up_where_it_harms_nobody() -> None:
    """The rules would be refused before; here they are tried."""
    description = json.loads(SMALL["byte-level"]().backend_tokenizer.to_str())
    description["normalizer"] = sequence([replace({"String": "a"}, "aa")] * 40)
    with pytest.raises(ValueError, match="takes more than") as caught:
        try_tokenizer(json.dumps(description).encode(), memory=2**26)
    assert "\n" not in str(caught.value)
