"""Tokenizer files that would take memory, or end the process: refused before a library reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cache.forgery import sign
from teachercache.cache import Cache
from teachercache.errors import CacheDamaged, ModelError
from teachercache.models.loading import load_tokenizer
from teachercache.stream.tokenizers import teacher_tokenizer

from builders import tiny_cache


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cache(tmp_path_factory.mktemp("made"))


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "cache"))


def _vocabulary(data: dict[str, Any]) -> dict[str, Any]:
    return data["model"]["vocab"]


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
