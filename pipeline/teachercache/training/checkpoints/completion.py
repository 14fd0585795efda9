"""Completion of checkpoints: tells which folders of a run are whole, and whether their bytes are still those that were
written.

A checkpoint is many files, written by all processes; a job that is killed meanwhile leaves half of them. The last file
written is `complete.json`, after everything else has reached the disk: a folder without it is never resumed from. It
holds the size and sha256 of every other file, the digest of itself, and how many processes wrote the checkpoint; any
other number can resume from it too, see elastic.py. Who goes on from it checks it first, see resuming.py.

sha256 runs at about 1.4 GB/s a process on an ordinary core, and processes share the files among themselves: the 14 GB of
a student of a billion weights take 8 of them between one and two seconds.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from teachercache.cache.files.regular_files import read_regular
from teachercache.errors import JobFailed
from teachercache.files import is_temporary
from teachercache.training.checkpoints import universal
from teachercache.training.checkpoints.digests import (
    StoredFile,
    first_damage,
    read_digests,
    stored_files,
    write_digests,
)

MARKER = "complete.json"
DAMAGED = "damaged-"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint with a marker: its folder, optimizer step, how many processes wrote it, and its files by name."""

    folder: Path
    step: int
    world_size: int
    files: Mapping[str, StoredFile] | None  # None: written without digests, by an earlier version
    damage: str | None = None  # why its marker says nothing

    @property
    def name(self) -> str:
        """Its name in messages."""
        return self.folder.name


def checkpoint_folder(run: Path, step: int) -> Path:
    """Returns the folder of a step's checkpoint; transformers gives the name."""
    return run / f"checkpoint-{step}"


def marked_checkpoints(run: Path) -> list[Checkpoint]:
    """All checkpoints of a run that have a marker, readable or not, oldest first."""
    checkpoints = [_marked(folder, step) for folder, step in _folders(run) if (folder / MARKER).exists()]
    return sorted(checkpoints, key=lambda checkpoint: checkpoint.step)


def complete_checkpoints(run: Path) -> list[Checkpoint]:
    """All whole checkpoints of a run, oldest first; of their bytes, only the markers' are checked."""
    return [checkpoint for checkpoint in marked_checkpoints(run) if checkpoint.damage is None]


def whole_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint in a folder; None where there is none, or only half of one."""
    name = _NAME.fullmatch(folder.name)
    if not name or not (folder / MARKER).is_file():
        return None
    checkpoint = _marked(folder, int(name[1]))
    return checkpoint if checkpoint.damage is None else None


def _marked(folder: Path, step: int) -> Checkpoint:
    try:
        settings, files = read_digests(folder / MARKER)
        return Checkpoint(folder, step, settings["world_size"], files)
    except OSError as error:
        raise unreadable(folder, error) from error
    except (ValueError, KeyError):
        processes = _of_earlier_version(folder / MARKER)
    if processes is None:
        return Checkpoint(folder, step, 0, None, damage=f"{MARKER} is not what was written")
    return Checkpoint(folder, step, processes, files=None)


def _of_earlier_version(marker: Path) -> int | None:
    """Returns the number of processes of a checkpoint whose marker says only that; None for any other marker."""
    try:
        data = json.loads(read_regular(marker.parent, marker.name, most=2**16))
    except (ValueError, OSError, RecursionError):
        return None
    processes = data["world_size"] if isinstance(data, dict) and data.keys() == {"world_size"} else None
    return processes if type(processes) is int and processes > 0 else None


def names_of(folder: Path) -> dict[str, int]:
    """Size of each file of a checkpoint that is being written, but for the marker, by name."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    return {name: size for name, size in sizes.items() if name != MARKER and not is_temporary(name, of=MARKER)}


def exported_damage(checkpoint: Checkpoint) -> str | None:
    """Describes the first damage to the files that an export reads: weights and configuration, but no optimizer's
    state. None: no damage."""
    read = {name: stored for name, stored in (checkpoint.files or {}).items() if "/" not in name}
    try:
        return first_damage(checkpoint.folder, read)
    except OSError as error:
        raise unreadable(checkpoint.folder, error) from error


def unreadable(folder: Path, error: OSError) -> JobFailed:
    """A checkpoint of which nobody can tell now whether it is damaged; it stays as it is."""
    return JobFailed(f"{folder} cannot be read ({error.strerror}); nothing was changed: run the same command again")


def mark_complete(folder: Path, *, world_size: int, files: Mapping[str, StoredFile] | None = None) -> None:
    """Declare a checkpoint whole, once all of its bytes are on disk; without `files` they are hashed here."""
    if files is None:
        files = stored_files(folder, names_of(folder))
    write_digests(folder / MARKER, files, world_size=world_size)


def remove_incomplete(run: Path) -> list[Path]:
    """Delete what a killed job left half written; returns the folders."""
    removed = [folder for folder, _ in _folders(run) if not (folder / MARKER).is_file()]
    for folder in removed:
        shutil.rmtree(folder)
    return removed


def remove(checkpoint: Checkpoint) -> None:
    """Delete a checkpoint."""
    (checkpoint.folder / MARKER).unlink()  # first, so that a half deleted folder does not count as whole
    shutil.rmtree(checkpoint.folder)


def set_aside(checkpoint: Checkpoint) -> Path | None:
    """Rename a damaged checkpoint to `damaged-checkpoint-N`: what is whole in it may be all that somebody has. One is kept in a
    run, and none where the disk would have no room for another checkpoint; returns where it is, or None once it is deleted."""
    run = checkpoint.folder.parent
    for earlier in run.glob(f"{DAMAGED}checkpoint-*"):
        shutil.rmtree(earlier, ignore_errors=True)
    size = sum(path.lstat().st_size for path in checkpoint.folder.rglob("*"))
    if shutil.disk_usage(run).free < size:
        remove(checkpoint)
        return None
    return checkpoint.folder.rename(run / f"{DAMAGED}{checkpoint.name}")


def rotate(run: Path, *, keep: int, best_step: int | None) -> None:
    """Delete checkpoints but for the `keep` latest whole ones and the best one, and what was converted to resume from."""
    marked, complete = marked_checkpoints(run), complete_checkpoints(run)
    for checkpoint in complete:
        universal.discard(checkpoint.folder)
    kept = {checkpoint.step for checkpoint in complete[-keep:]} | {best_step}
    for checkpoint in marked:
        if checkpoint.step not in kept:
            remove(checkpoint)


def _folders(run: Path) -> list[tuple[Path, int]]:
    named = [(path, _NAME.fullmatch(path.name)) for path in run.glob("checkpoint-*")]
    return [(path, int(match[1])) for path, match in named if match and path.is_dir()]
