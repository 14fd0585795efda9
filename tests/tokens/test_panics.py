"""Regular expressions that give up on a text, whose error is no `Exception`, end in a line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from teachercache.bounded.tokenizers import try_tokenizer
from teachercache.console import run_command
from teachercache.errors import ModelError, is_panic
from teachercache.tokens.prefix import own_prefix
from teachercache.tokens.spans import SpanFinder
from teachercache.tokens.vocabulary_map import token_pieces

from tokenizer_families import byte_level, wordpiece

# Tried in every way, and only where this word stands: nobody's trial has it.
WORD = "xyzzy"
EXPRESSION = f"(?={WORD})(?:" + "(?:(?:)|(?=.)|(?=..)|(?!Q)|(?!R)|(?!S)|(?!T)|(?!U)|(?!V))" * 9 + ")Z"


def with_expression(tokenizer: Any) -> Any:
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    split = {"type": "Split", "pattern": {"Regex": EXPRESSION}, "behavior": "Isolated", "invert": False}
    before = [split, description["pre_tokenizer"]]
    description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": before}
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(description))
    return tokenizer


@pytest.fixture(scope="module")
def hostile() -> Any:
    return with_expression(byte_level())


def test_the_trial_does_not_find_it(hostile: Any) -> None:
    try_tokenizer(hostile.backend_tokenizer.to_str().encode())
    with pytest.raises(BaseException) as caught:
        hostile(WORD)
    assert is_panic(caught.value)


def test_it_is_an_error_where_tokens_are_mapped(hostile: Any) -> None:
    source = wordpiece()
    source.add_tokens([WORD])
    with pytest.raises(ModelError, match=r"^a tokenizer gives up on a text \([^\n]*fetch the cache again$"):
        token_pieces(source, hostile)


def test_it_is_an_error_where_texts_are_read_again(hostile: Any) -> None:
    finder = SpanFinder.of(hostile)
    with pytest.raises(ModelError, match="gives up on a text"):
        finder.spans(WORD, [5])
    assert own_prefix(hostile) == ()


def test_a_command_ends_with_its_document(hostile: Any, capfd: pytest.CaptureFixture[str]) -> None:
    def work(_: object) -> dict[str, object]:
        return {"ids": hostile(WORD)["input_ids"]}

    assert run_command(work, as_json=True, show=lambda result: None) == 1
    assert json.loads(capfd.readouterr().out)["error"].startswith("unexpected PanicException")
