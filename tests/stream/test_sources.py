"""Caches of one run must fit together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from teachercache.cache import Cache
from teachercache.errors import CacheError
from teachercache.stream.sources import Mixed, check_mix

from builders import beginning_with, sentences, tiny_cache, tiny_teacher, tiny_tokenizer


def caches(folder: Path, tokenizer: Any, *choices: str) -> list[Cache]:
    """One for each choice of what rows begin with, of other texts each."""
    teacher = tiny_teacher(folder / "teacher", tokenizer=tokenizer, layers=1)
    return [
        Cache.open(
            tiny_cache(
                folder / f"{number}", teacher=teacher, texts=sentences(8, seed=number), sequence={"prefix": choice}
            )
        )
        for number, choice in enumerate(choices)
    ]


def test_rows_that_begin_otherwise_do_not_mix(tmp_path: Path) -> None:
    plain, same, bare = caches(tmp_path, beginning_with(tiny_tokenizer(), "<bos>"), "auto", "bos", "none")
    check_mix(plain, [Mixed(same)])
    with pytest.raises(
        CacheError, match=r"begin with \d+ \(sequence.prefix: auto\).* with nothing .*: none"
    ) as refusal:
        check_mix(plain, [Mixed(same), Mixed(bare)])
    assert "\n" not in str(refusal.value) and "one sequence.prefix" in str(refusal.value)


def test_a_choice_does_not_mix_with_a_tokenizer_that_puts_nothing_in_front(tmp_path: Path) -> None:
    plain, bare, ended = caches(tmp_path, tiny_tokenizer(), "auto", "none", "eos")
    check_mix(plain, [Mixed(bare)])
    with pytest.raises(CacheError, match="with nothing .*: auto.* with 0 .*: eos"):
        check_mix(plain, [Mixed(ended)])
