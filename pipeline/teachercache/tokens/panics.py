"""Panics of tokenizers, as errors.

A regular expression of a tokenizer may give up on a text that nobody tried before (`bounded.tokenizers`). The library in Rust
then raises what is no `Exception`, which would end a process with a traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from teachercache.errors import ModelError, is_panic


@contextmanager
def panics_refused() -> Iterator[None]:
    """While it is open, or in the function that it decorates, a panic is a `ModelError` in one line."""
    try:
        yield
    except BaseException as error:
        if not (is_panic(error) or type(error) is Exception):  # which is what it raises where it does not give up
            raise
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"a tokenizer gives up on a text ({reason}): take the tokenizer from who made the model; where it is a cache's, "
            "fetch the cache again"
        ) from None
