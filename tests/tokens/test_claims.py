"""Tokenizer files that would take memory, or end the process: refused before a library reads them."""

from __future__ import annotations

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
from teachercache.tokens.claims import MOST_CONFIG_VALUES, MOST_VALUES, check_tokenizer_files
from teachercache.tokens.fingerprint import saved_fingerprint, tokenizer_fingerprint
from teachercache.tokens.rules import check_rules

from builders import tiny_cache
from hostile_tokenizers import CONFIGS, DESCRIPTIONS, replace, sequence
from tokenizer_families import REAL, SMALL


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cache(tmp_path_factory.mktemp("made"))


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "cache"))


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


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_that_lie_are_refused_or_change_nothing(made: Path, cache: Path, name: str) -> None:
    path = cache / "teacher" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **CONFIGS[name]}))
    (cache / "teacher" / "evil.py").write_text(f"open({str(cache / 'ran')!r}, 'w')\n")
    sign(cache, lambda data: data["files"].append({"file": "teacher/evil.py", "bytes": 0, "sha256": ""}))
    try:
        tokenizer = teacher_tokenizer(Cache.open(cache))
    except CacheDamaged as error:
        assert "\n" not in str(error)
    else:
        own = Cache.open(made).manifest.tokenizer["fingerprint"]
        assert len(tokenizer) == 300 and tokenizer_fingerprint(tokenizer) == own
    assert not (cache / "ran").exists(), "nothing is executed"


@pytest.mark.parametrize(
    "config",
    [{"tokenizer_class": "LlamaTokenizer"}, {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}],
    ids=["another class", "a class with a setting"],
)
def test_a_class_that_makes_another_tokenizer_of_the_files_is_refused(cache: Path, config: dict[str, Any]) -> None:
    """Also where the manifest is signed for what the files say: a student must not read what they do not."""
    path = cache / "teacher" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    said = saved_fingerprint(path.parent)
    sign(cache, lambda manifest: manifest["settings"]["tokenizer"].update(fingerprint=said))
    with pytest.raises(CacheDamaged, match="another tokenizer than their description|cannot be trusted"):
        teacher_tokenizer(Cache.open(cache))


def test_a_cache_without_a_description_of_its_tokenizer_is_refused(cache: Path) -> None:
    sign(cache, lambda data: data.update(files=[f for f in data["files"] if "tokenizer.json" not in f["file"]]))
    with pytest.raises(CacheDamaged, match=r"there is no tokenizer\.json"):
        teacher_tokenizer(Cache.open(cache))


def test_values_of_a_file_are_counted_before_it_is_read(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "teacher", tmp_path / "teacher"))
    count = MOST_CONFIG_VALUES + 1
    (folder / "added_tokens.json").write_text(json.dumps(dict.fromkeys(map(str, range(count)), 2**31)))
    with pytest.raises(
        ValueError, match=rf"^added_tokens\.json lists {count + 1} values, at most {MOST_CONFIG_VALUES} are"
    ):
        check_tokenizer_files(folder, vocabulary_size=300)  # else: that it names an id which is none


def test_large_tokenizer_files_are_refused(cache: Path) -> None:
    with (cache / "teacher" / "tokenizer.json").open("wb") as stream:
        stream.truncate(2**31)
    sign_large = lambda data: [f.update(bytes=2**31) for f in data["files"] if "tokenizer.json" in f["file"]]  # noqa: E731
    (cache / "teacher" / "tokenizer.json").rename(cache / "aside")
    sign(cache, sign_large)
    (cache / "aside").rename(cache / "teacher" / "tokenizer.json")
    with pytest.raises(CacheDamaged, match=r"at most 67108864 are possible"):
        teacher_tokenizer(Cache.open(cache))


def test_a_panic_of_the_library_is_an_error_of_one_line(cache: Path, tmp_path: Path) -> None:
    """An error of Rust where it gives up is no `Exception`."""
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
