"""Which checkpoint folders of a run are whole.

A checkpoint is many files, written by all processes; a job that is killed meanwhile leaves half of them. The last file
written is `complete.json`, after everything else has reached the disk: a folder without it is never resumed from. It
says how many processes wrote the checkpoint; any other number can resume from it too, see elastic.py.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from teachercache.files import sync, sync_files
from teachercache.student import universal

MARKER = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder, optimizer step, and how many processes wrote it."""

    folder: Path
    step: int
    world_size: int


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies; transformers gives the name."""
    return run / f"checkpoint-{step}"


def complete_checkpoints(run: Path) -> list[Checkpoint]:
    """All whole checkpoints of a run, oldest first."""
    found = [whole for folder, _ in _folders(run) if (whole := whole_checkpoint(folder))]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def whole_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint in a folder; None where there is none, or only half of one."""
    name, marker = _NAME.fullmatch(folder.name), folder / MARKER
    if not name or not marker.is_file():
        return None
    return Checkpoint(folder, int(name[1]), json.loads(marker.read_text(encoding="utf-8"))["world_size"])


def mark_complete(folder: Path, *, world_size: int) -> None:
    """Declare a checkpoint whole, once all of its bytes are on disk."""
    sync_files(folder)
    temporary = folder / (MARKER + ".tmp")
    temporary.write_text(json.dumps({"world_size": world_size}), encoding="utf-8")
    sync(temporary)
    temporary.replace(folder / MARKER)


def remove_incomplete(run: Path) -> list[Path]:
    """Delete what a killed job left half written; returns the folders."""
    removed = [folder for folder, _ in _folders(run) if not (folder / MARKER).is_file()]
    for folder in removed:
        shutil.rmtree(folder)
    return removed


def rotate(run: Path, *, keep: int, best_step: int | None) -> None:
    """Delete whole checkpoints but for the `keep` latest ones and the best one, and what was converted to resume from."""
    found = complete_checkpoints(run)
    for checkpoint in found:
        universal.discard(checkpoint.folder)
    for checkpoint in found[:-keep]:
        if checkpoint.step != best_step:
            (checkpoint.folder / MARKER).unlink()  # first, so that a half deleted folder does not count as whole
            shutil.rmtree(checkpoint.folder)


def _folders(run: Path) -> list[tuple[Path, int]]:
    named = [(path, _NAME.fullmatch(path.name)) for path in run.glob("checkpoint-*")]
    return [(path, int(match[1])) for path, match in named if match and path.is_dir()]
