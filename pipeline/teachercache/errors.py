"""Every error that teachercache raises on purpose.

    TeachercacheError          exit status 1
    ├── UserError              exit status 2: a mistake that the user can mend; one line, no traceback
    │   ├── RecipeError        a recipe that does not parse or does not make sense
    │   ├── ModelError         a model or tokenizer that cannot be loaded or used
    │   ├── CorpusError        a corpus that cannot be read, or holds nothing
    │   └── CacheError         a cache that is missing, unfinished, or does not fit what is asked of it
    ├── CacheDamaged           bytes on disk differ from what the manifest promises
    └── JobFailed              a job could not be completed; what it finished is kept

The command line prints `str(error)` and exits with `error.exit_status`; anything else that reaches the top is a bug
and keeps its traceback. Messages say what, where and the remedy.
"""

import re

MOST_CHARACTERS = 2000  # of a line
_BEGINS, _ENDS = 1200, 700  # characters that stay of a longer one: what and where, and the remedy
_BREAKS = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029\ud800-\udfff]")


def one_line(text: str) -> str:
    """A text in one line of at most `MOST_CHARACTERS`: new lines are spelled out, the middle of a longer one is left
    out. Somebody else's names and values stand in messages, and may be megabytes, or lines that look like ours."""
    if len(text) > 2 * MOST_CHARACTERS:
        text = text[:MOST_CHARACTERS] + text[-MOST_CHARACTERS:]
    line = _BREAKS.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)
    return line if len(line) < MOST_CHARACTERS else f"{line[:_BEGINS]} … {line[-_ENDS:]}"


class TeachercacheError(Exception):
    """Base of all errors here; `str()` is one readable line."""

    exit_status = 1

    def __str__(self) -> str:
        return one_line(super().__str__())


class UserError(TeachercacheError):
    """The user's mistake, with its remedy."""

    exit_status = 2


class RecipeError(UserError):
    """A recipe that does not parse or does not make sense."""


class ModelError(UserError):
    """A model or tokenizer that cannot be loaded or used."""


class CorpusError(UserError):
    """A corpus that cannot be read, or holds nothing."""


class CacheError(UserError):
    """A cache that is missing, unfinished, or does not fit what is asked of it."""


class CacheDamaged(TeachercacheError):
    """Bytes on disk differ from what the manifest promises."""


class JobFailed(TeachercacheError):
    """A job could not be completed; what it finished is kept."""


def is_panic(error: BaseException) -> bool:
    """Tells whether an error is a panic of a library in Rust; that is no `Exception`."""
    return type(error).__module__ == "pyo3_runtime"
