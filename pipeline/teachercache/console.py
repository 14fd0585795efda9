"""Output of a command: progress and messages on stderr, its result on stdout, one readable line for an error.

With `--json`, stdout is exactly one JSON document, also when a bug ends the command. Libraries below us (Ray, DeepSpeed)
print to stdout as they like, so file descriptor 1 itself points to stderr while a command runs.
"""

from __future__ import annotations

import json
import logging
import os
import re
import select
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from teachercache.errors import TeachercacheError, UserError, is_panic, one_line

BUG = 1
INTERRUPTED = 130
# What a command imports beyond the base install, and the extra that brings it.
EXTRAS = dict.fromkeys(("ray", "datasets"), "precompute") | dict.fromkeys(("deepspeed", "peft", "tensorboard"), "train")
EXTRAS |= dict.fromkeys(("torch", "transformers", "accelerate", "safetensors", "gguf", "jinja2"), "all")


def run_command(
    work: Callable[[Console], dict[str, Any]], *, as_json: bool, show: Callable[[dict[str, Any]], Any]
) -> int:
    """Run `work` with a console on stderr and print its result; returns the exit status.

    `show` turns the result into something that rich can print, for people; a result with `"ok": false` exits with 1.
    Names of tokens, models and files may look like rich's markup: show them as `Text`.
    """
    _quiet_libraries()
    console = PlainTextConsole(stderr=True, emoji=False)
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        result = work(console)
        status = 0 if result.get("ok", True) else 1
    except TeachercacheError as error:
        result, status = _failed(console, str(error), status=error.exit_status)
    except KeyboardInterrupt:
        result, status = {"error": "interrupted", "exit_status": INTERRUPTED}, INTERRUPTED
        console.print("interrupted; what is finished is kept, run the same command again to go on")
    except BaseException as error:
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        if isinstance(error, OSError) and error.filename is not None:
            reason = f"{_text(error.filename)}: {error.strerror}; check the path and its permissions"
            result, status = _failed(console, reason, status=UserError.exit_status)
        elif (missing := _missing_extra(error)) is not None:
            result, status = _failed(console, str(missing), status=missing.exit_status)
        else:
            sys.stderr.write(without_controls(traceback.format_exc()))
            what = one_line(f"unexpected {type(error).__name__}: {error}")
            result, status = {"error": what, "exit_status": BUG}, BUG
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)
        _drop_unread_stderr()
    if not is_main_process():
        return status
    if as_json:
        print(json.dumps(result, default=str))
    elif "error" not in result:
        shown = show(result)
        if shown is not None:
            PlainTextConsole(emoji=False).print(shown)
    sys.stdout.flush()
    return status


def _drop_unread_stderr() -> None:
    """Point stderr nowhere if nobody reads it any more: Python would end with 120, not with our status, where a library's
    last words cannot be flushed."""
    poll = select.poll()
    poll.register(2, 0)
    if any(event & (select.POLLERR | select.POLLNVAL) for _, event in poll.poll(0)):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)


class PlainTextConsole(Console):
    """Rich's console, on which text cannot command the terminal: names and texts of a cache are somebody else's."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """As rich does, with control characters of text shown as what they are."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(without_controls(segment.text), segment.style)


def without_controls(text: str) -> str:
    """Text whose control characters, and those that turn the direction of writing, are spelled out: `\\x1b`. New lines and
    tabs stay."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def _failed(console: Console, message: str, *, status: int) -> tuple[dict[str, Any], int]:
    message = one_line(message)
    console.print("error:", message, style="red", markup=False, highlight=False, soft_wrap=True)
    return {"error": message, "exit_status": status}, status


def _missing_extra(error: BaseException) -> UserError | None:
    """The mistake of asking for a command whose libraries are not installed; None for any other error."""
    name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if name not in EXTRAS:
        return None
    return UserError(f'this command needs {name}, which is not installed; pip install "teachercache[{EXTRAS[name]}]"')


def _text(name: str | bytes | int) -> str:
    return os.fsdecode(name) if isinstance(name, bytes) else str(name)


def is_main_process() -> bool:
    """Tells whether this process may print results: the first of those that a launcher started, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def _quiet_libraries() -> None:
    """Send no usage statistics anywhere; keep libraries' chatter below warnings, and their progress bars out of files."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():  # a bar that is drawn again and again is a hundred lines there
        os.environ.setdefault("TQDM_DISABLE", "1")
    # DeepSpeed, which transformers imports to save a model, warns wherever there is no GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
