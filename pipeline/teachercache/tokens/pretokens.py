"""Pre-tokens: finds the tokens that begin a new one, by asking the tokenizer itself.

Tokenizers cut a text into pre-tokens (words with the space before them, runs of digits, punctuation) before they merge
anything, and no token reaches across such a cut. So the teacher's mass on the tokens that begin a new one is the
probability that the pre-token ends here, which students of any vocabulary can be held to.

Source: Minixhofer, Ponti & Vulić, "Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching", 2025
(outcome chunk debiasing).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from teachercache.tokens.fingerprint import require_fast, vocabulary_size
from teachercache.tokens.panics import panics_refused
from teachercache.tokens.token_bytes import BYTE_OF

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LETTER = "a"  # what a token comes after
COMPLETIONS = (
    64  # characters that a token's first, incomplete one may become: as many are asked, and most of them decide
)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's
_CUT = "\ufffd"  # what decoders make of an incomplete character


@panics_refused()
def begins_pretoken(tokenizer: PreTrainedTokenizerBase, *, cut_as: Any = None) -> NDArray[np.bool_]:
    """Marks the tokens that begin a new pre-token when they come after a letter, [V]; takes seconds for 100,000 tokens.

    Their text begins with white space, or the pre-tokenizer of `cut_as` (default: the tokenizer itself) cuts between the letter
    and it: two sides whose masses are compared must mean the same event. Special and
    other added tokens do: text is cut at them before anything else. A token whose first character is incomplete does where
    most of the characters do that it may become. Numbers without a token do not. Raises `ModelError` for a slow
    tokenizer."""
    backend = require_fast(tokenizer).backend_tokenizer
    added = backend.get_added_tokens_decoder()
    begins_V = np.zeros(vocabulary_size(tokenizer), dtype=np.bool_)
    cuts = _cutter(require_fast(cut_as or tokenizer).backend_tokenizer.pre_tokenizer)
    text_of = _reader(backend)
    for token, number in tokenizer.get_vocab().items():
        begins_V[number] = number in added or _begins(token, text_of(token), cuts)
    return begins_V


def _begins(token: str, text: str, cuts: Callable[[str], bool]) -> bool:
    if not text.startswith(_CUT) or (start := _first_bytes(token)) is None:
        return cuts(text)
    asked = [cuts(character) for character in _completions(start)]
    return sum(asked) * 2 > len(asked)


def _cutter(pre_tokenizer: Any) -> Callable[[str], bool]:
    """Returns a test: does this text, after a letter, begin a new pre-token?"""

    def cuts(text: str) -> bool:
        if not text or text[0].isspace():
            return bool(text)
        if pre_tokenizer is None:
            return False
        return bool(pre_tokenizer.pre_tokenize_str(LETTER + text)[0][1][1] == len(LETTER))

    return cuts


def _reader(backend: Any) -> Callable[[str], str]:
    """The text of a token that comes after a letter; a tokenizer without a decoder joins its tokens by spaces, if words are
    what it knows."""
    if backend.decoder is not None:
        return lambda token: backend.decoder.decode([LETTER, token])[len(LETTER) :]
    return (lambda token: token) if backend.pre_tokenizer is None else (lambda token: f" {token}")


def _first_bytes(token: str) -> bytes | None:
    """The bytes of a token's first, incomplete character: b"" where none begins there, None where none are spelled."""
    if match := _BYTE_TOKEN.fullmatch(token):
        values = bytes([int(match[1], 16)])
    elif all(char in BYTE_OF for char in token):
        values = bytes(BYTE_OF[char] for char in token)
    else:
        return None
    found_bytes = re.match(rb"[\xc2-\xf4][\x80-\xbf]{0,2}", values)
    return (
        found_bytes[0] if found_bytes else b""
    )  # bytes that continue a character follow no letter: they begin nothing


def _completions(start: bytes) -> list[str]:
    """Characters whose UTF-8 begins with these bytes, evenly chosen among those that are assigned."""
    characters = list(_assigned(start)) if start else []
    return characters[:: max(1, len(characters) // COMPLETIONS)]


def _assigned(start: bytes) -> Iterator[str]:
    lead = start[0]
    length = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    first = lead & (0x7F >> length)
    for byte in start[1:]:
        first = first << 6 | byte & 0x3F
    open_bits = 6 * (length - len(start))
    for code in range(first << open_bits, min((first + 1) << open_bits, 0x110000)):
        # An overlong spelling is of a character with fewer bytes.
        if code >= (0x80, 0x800, 0x10000)[length - 2] and unicodedata.category(chr(code))[0] != "C":
            yield chr(code)
