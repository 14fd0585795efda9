"""Checks of what a tokenizer's files say of themselves, before a library reads them.

Libraries make room for the highest id that a file names, or end the process where they cannot: an id of 2^31 takes
gigabytes, and a tokenizer that somebody else wrote can name any. So its ids are held against how many tokens there
are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from teachercache.bounded.strangers_json import parse_json, values_of
from teachercache.tokens.rules import check_rules

DESCRIPTION, CONFIG, SPECIALS = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
MOST_CONFIG_VALUES = 2**18  # of any other file; Gemma's 6,000 added tokens are 45,000
MOST_VALUES = 2**22  # of one file; Gemma's 262,000 tokens and their merges are 2 million
MOST_SPECIAL = 2**12  # tokens that a configuration makes special; libraries take them one by one, 0.3 ms each
_LISTED_SPECIAL = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
# Files with tokens and their ids: a dict of tokens, or of ids as text under this key.
_FURTHER = {"vocab.json": None, "added_tokens.json": None, CONFIG: "added_tokens_decoder"}
_LISTS = (DESCRIPTION, "vocab.json")


def check_tokenizer_files(folder: Path, *, vocabulary_size: int) -> None:
    """Raise `ValueError`, in one line, where files of a tokenizer name an id that `vocabulary_size` tokens do not have, or
    are none. Their size is bounded by whoever put them there."""
    if not (folder / DESCRIPTION).is_file():
        raise ValueError(f"there is no {DESCRIPTION}")
    _check_counts(folder)  # before any of them takes memory
    description = _json(folder / DESCRIPTION)
    _check(DESCRIPTION, _described_ids(description), vocabulary_size)
    check_rules(description, vocabulary_size=vocabulary_size)
    for name, key in _FURTHER.items():
        if (folder / name).is_file():
            content = _json(folder / name)
            ids = content.values() if key is None else map(_number, content.get(key, {}))
            _check(name, iter(ids), vocabulary_size)
    if (folder / CONFIG).is_file():
        config = _json(folder / CONFIG)
        _check_paths(config)
        _check_specials(
            CONFIG, {key: config[key] for key in config if key in _LISTED_SPECIAL or key.endswith("_token")}
        )
    if (folder / SPECIALS).is_file():
        _check_specials(SPECIALS, _json(folder / SPECIALS))


def _check_counts(folder: Path) -> None:
    for path in sorted(folder.glob("*.json")):  # transformers copies what stands in them several times
        if path.name not in _LISTS and (count := values_of(path.read_bytes())) > MOST_CONFIG_VALUES:
            raise ValueError(f"{path.name} lists {count} values, at most {MOST_CONFIG_VALUES} are possible")


def _check_paths(config: dict[str, Any]) -> None:
    """transformers opens files that the configuration names, wherever they are, before those of the folder."""
    named = [key for key in config if key.endswith("_file") and key != "special_tokens_map_file" and config[key]]
    if named:
        raise ValueError(f"{CONFIG} names a file of its own ({named[0][:40]})")
    if "auto_map" in config:  # who trusts remote code would run it; no cache is written with it
        raise ValueError(f"{CONFIG} names code of its own (auto_map)")


def _check_specials(name: str, named: dict[str, Any]) -> None:
    count = sum(len(value) if isinstance(value, list | dict) else 1 for value in named.values())
    if count > MOST_SPECIAL:
        raise ValueError(f"{name} lists {count} special tokens, at most {MOST_SPECIAL} are possible")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_bytes(), most=MOST_VALUES)
    except ValueError as error:
        raise ValueError(f"{path.name} is no JSON ({' '.join(str(error).split())[:100]})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is no description of a tokenizer")
    return content


def _described_ids(description: dict[str, Any]) -> Iterator[Any]:
    try:
        vocabulary = description["model"].get("vocab", {})
        if isinstance(vocabulary, dict):
            yield from vocabulary.values()
        else:
            yield len(vocabulary) - 1 if len(vocabulary) else 0
        yield from (token["id"] for token in description.get("added_tokens") or ())
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{DESCRIPTION} describes no tokenizer ({error})") from None


def _number(text: str) -> Any:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else text


def _check(name: str, ids: Iterator[Any], vocabulary_size: int) -> None:
    for token in ids:
        if type(token) is not int or not 0 <= token < vocabulary_size:
            shown = str(token)[:20] if type(token) is int and abs(token) < 2**64 else "something else"
            raise ValueError(f"{name} gives a token the id {shown}, of {vocabulary_size} tokens")
