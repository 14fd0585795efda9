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


class TeachercacheError(Exception):
    """Base of all errors here; `str()` is one readable line."""

    exit_status = 1


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
