"""Units through Ray Data with the errors that users are to see: a stage's exception travels as a part of its row."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from typing import Any

from teachercache.errors import JobFailed, TeachercacheError

logger = logging.getLogger(__name__)

Row = dict[str, Any]


def carrying_errors(stage: Callable[[Row], Any], row: Row, *, what: str | None = None) -> Row:
    """Run one stage on `{unit, payload, problem}`; an exception becomes the row's `problem` and passes by later stages.

    Ray Data would keep a failing stage's text but lose the exception itself, so that a user's mistake could not be told
    from a failure.
    """
    if row["problem"] is not None:
        return row
    try:
        return {"unit": row["unit"], "payload": pickle.dumps(stage(row)), "problem": None}
    except TeachercacheError as error:
        problem: TeachercacheError = error
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic in Rust is no `Exception`
        failed = what or f"unit {row['unit']}"
        logger.exception("%s", failed)
        problem = JobFailed(
            f"{failed} failed: {type(error).__name__}: {error}; run the same command again to try once more"
        )
    return {"unit": row["unit"], "payload": b"", "problem": pickle.dumps(type(problem)(str(problem)))}


def stopped(error: Exception) -> JobFailed:
    """The failure of a job that Ray itself ended, in a line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return JobFailed(f"the job stopped: {lines[-1]}; run the same command again to go on")
