"""Large texts, tokenised in slices that give the tokens of the whole.

A text may be cut between two words, `… the| next …`, if

- no token of the vocabulary has a space behind the byte that ends the first word: then no token reaches across, neither by
  merges nor by the best path of a unigram model;
- what stands around the cut has the same tokens and offsets in two halves as in one piece: normalisers and pre-tokenizers look
  at little more than their neighbours, and what they do at the ends of a text (a space in front, stripped white space) shows
  there.

Where nothing can be cut, the text is tokenised whole, at 350 bytes of memory a token.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teachercache.tokens.token_bytes import TokenBytes

SLICE_CHARACTERS = 2**19
SEARCHED = 2**16  # characters behind the wanted end of a slice in which a cut is looked for
AROUND = 256  # characters on each side of a cut that are tokenised to try it
TRIED = 8  # cuts in each of which that fails
_BETWEEN = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")

Tokens = tuple[NDArray[np.int32], NDArray[np.int32]]  # ids [S] and character spans [S, 2]
Tokenise = Callable[[str], Tokens]  # without special tokens


@dataclass
class Slicer:
    """Finds where texts may be cut for a tokenizer."""

    tokenizer: Any
    tokenise: Tokenise

    @cached_property
    def _before_spaces(self) -> frozenset[int]:
        """Bytes that stand before a space inside a token."""
        tokens = (token for token in TokenBytes.of(self.tokenizer).contents if token)
        return frozenset(byte for token in tokens for byte, after in pairwise(token) if after == 0x20)

    def slices(self, text: str, *, size: int = SLICE_CHARACTERS) -> list[str]:
        """The text in slices of at least `size` characters but for the last; what is found no cut in stays whole."""
        bounds = [0]
        while len(text) - bounds[-1] > 2 * size:
            cut = self._cut(text, bounds[-1] + size)
            if cut is None:
                break
            bounds.append(cut)
        return [text[start:stop] for start, stop in zip(bounds, [*bounds[1:], len(text)], strict=True)]

    def _cut(self, text: str, wanted: int) -> int | None:
        tried = 0
        for match in _BETWEEN.finditer(text, wanted, wanted + SEARCHED):
            cut = match.start()
            if self._is_unspanned(text[cut - 1]):
                if self._is_seamless(text[max(0, cut - AROUND) : cut], text[cut : cut + AROUND]):
                    return cut
                tried += 1
            if tried == TRIED:
                break
        return None

    def _is_unspanned(self, letter: str) -> bool:
        """Tells whether no token has a space behind this letter."""
        if not self._before_spaces:
            return True
        normalizer = self.tokenizer.backend_tokenizer.normalizer
        normal = letter if normalizer is None else normalizer.normalize_str(letter)[-1:]
        return not self._before_spaces & {letter.encode()[-1], *normal.encode()[-1:]}

    def _is_seamless(self, left: str, right: str) -> bool:
        whole, halves = self.tokenise(left + right), joined([self.tokenise(left), self.tokenise(right)], [left, right])
        return all(np.array_equal(a, b) for a, b in zip(whole, halves, strict=True))


def joined(parts: list[Tokens], texts: list[str]) -> Tokens:
    """The tokens of neighbouring texts as those of one."""
    starts = accumulate((len(text) for text in texts[:-1]), initial=0)
    ids_S = np.concatenate([ids for ids, _ in parts])
    return ids_S, np.concatenate([chars + start for (_, chars), start in zip(parts, starts, strict=True)])
