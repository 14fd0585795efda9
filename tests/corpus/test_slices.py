"""Texts in slices have the tokens, and their places, of texts that are tokenised whole."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teachercache.corpus.slices import Slicer, Tokens, joined

from tokenizer_families import LINES, REAL, SMALL

PIECES = [
    *LINES, *(f"{line}\n" for line in LINES), " ", "  ", "\n", "\n\n", "\t", "\r\n", "1234567890", "...", "!?\n", "don't we'll",
    "</s>", "<|im_end|>", "the cat", "sat on", "a mat", " (and", "so on) ", "e\u0301", "\u00a0", "x" * 70, "ﬁ nal", "A B c",
]  # fmt: skip
SIZE = 3000
# What they do at the beginning of a text shows at each cut: a space in front, or an offset that is not trimmed.
CUT_NOWHERE = {"byte-level", "byte-level, prefix space", "SentencePiece BPE, Llama 2"}


def tokens_of(tokenizer: Any, text: str) -> Tokens:
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return np.array(found["input_ids"], np.int32), np.array(found["offset_mapping"], np.int32).reshape(-1, 2)


@pytest.mark.parametrize("name", [*SMALL, *REAL])
@given(seed=st.integers(0, 2**32))
@settings(max_examples=3, deadline=None)
def test_slices_have_the_tokens_of_the_whole(name: str, seed: int) -> None:
    tokenizer = {**SMALL, **REAL}[name]()
    rng = random.Random(seed)
    text = "".join(rng.choice(("", " ", " ")) + piece for piece in rng.choices(PIECES, k=500))
    slicer = Slicer(tokenizer, lambda part: tokens_of(tokenizer, part))
    slices = slicer.slices(text, size=SIZE)
    assert "".join(slices) == text
    found = joined([slicer.tokenise(part) for part in slices], slices)
    for whole, sliced in zip(tokens_of(tokenizer, text), found, strict=True):
        np.testing.assert_array_equal(whole, sliced)
    assert (len(slices) == 1) == (name in CUT_NOWHERE)
