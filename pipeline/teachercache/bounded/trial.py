"""A tokenizer, loaded and tried with texts that are hard for rules and regular expressions."""

from __future__ import annotations

from typing import Any

_LENGTH = 2000
_TRIED = (
    "A text, 1 of 2:\n\té",
    *(character * _LENGTH for character in (" ", "a", "1", "!", "\n", "é", "好", "a\u0301", "\U0001f642")),
    "aA1 .\n" * (_LENGTH // 6),
    " " * _LENGTH + "a",
    "a" * _LENGTH + "!",
)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """`tokens`, how many it makes of the texts, or `refused`, why there are none; `data` is a tokenizer.json."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(request["data"])
        tokenizer.no_padding()
        tokenizer.no_truncation()
        ids = [tokenizer.encode(text).ids for text in _TRIED]
        for token in ids:
            tokenizer.decode(token)
    except MemoryError:
        raise
    except BaseException as error:  # what Rust raises where it gives up is no Exception
        return {"refused": " ".join(str(error)[:300].split())}
    return {"tokens": sum(map(len, ids))}
