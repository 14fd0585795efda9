"""Finds the checkpoint that a run goes on from: the newest one whose bytes are those that were written.

All processes call these functions together: each reads its share of the files, and all come to the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from teachercache.errors import JobFailed
from teachercache.training.checkpoints.completion import Checkpoint, marked_checkpoints, names_of, set_aside, unreadable
from teachercache.training.checkpoints.digests import StoredFile, first_damage, stored_files

Result = TypeVar("Result")


def intact_checkpoint(run: Path, *, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is as it was written; None where the run has none yet.

    A damaged one is left behind for the one before it, which makes it again, and is set aside. `say` gets a line about each.
    Raises `JobFailed` when all are damaged, and changes nothing.
    """
    damaged: list[tuple[Checkpoint, str]] = []
    for checkpoint in reversed(_from_main(lambda: marked_checkpoints(run))):
        damage = damage_of(checkpoint)
        if damage is None:
            _leave_behind(damaged, say=say)
            if checkpoint.files is None:
                say(f"{checkpoint.name} has no digests, an earlier version wrote it: its bytes are not checked")
            return checkpoint
        damaged.append((checkpoint, damage))
    if damaged:
        reasons = "; ".join(f"{checkpoint.name}: {damage}" for checkpoint, damage in damaged)
        raise JobFailed(
            f"{run} has no undamaged checkpoint to go on from ({reasons}); restore one from a backup, or delete {run} to "
            "train again from the beginning"
        )
    return None


def damage_of(checkpoint: Checkpoint) -> str | None:
    """Describes the damage to a checkpoint's bytes; None where there is none, or where nothing can be known."""
    if checkpoint.damage is not None or checkpoint.files is None:
        return checkpoint.damage
    names = _share({name: stored.bytes for name, stored in checkpoint.files.items()})
    share = {name: checkpoint.files[name] for name in names}
    try:
        damages = _from_all(lambda: first_damage(checkpoint.folder, share))
    except OSError as error:
        raise unreadable(checkpoint.folder, error) from error
    return next((damage for damage in damages if damage is not None), None)


def written_files(folder: Path) -> dict[str, StoredFile]:
    """Size and digest of every file of a checkpoint that all processes have written, once they have reached the disk."""
    share = _share(_from_main(lambda: names_of(folder)))
    shares = _from_all(lambda: stored_files(folder, share))
    return {name: stored for files in shares for name, stored in files.items()}


def _leave_behind(damaged: list[tuple[Checkpoint, str]], *, say: Callable[[str], None]) -> None:
    for checkpoint, damage in reversed(damaged):  # the newest one is kept
        say(f"{checkpoint.name} is damaged ({damage}): going on from the one before it")
        try:
            _from_all(partial(_set_aside, checkpoint))
        except OSError as error:
            raise JobFailed(f"{checkpoint.folder} is damaged, and cannot be set aside: {error}") from error


def _set_aside(checkpoint: Checkpoint) -> None:
    """In the main process alone."""
    if PartialState().is_main_process:
        set_aside(checkpoint)


def _share(sizes: Mapping[str, int]) -> list[str]:
    """This process's part of the files: every file goes to who has the least to read so far, large ones first."""
    state = PartialState()
    loads, names = [0] * state.num_processes, []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        process = loads.index(min(loads))
        loads[process] += sizes[name]
        if process == state.process_index:
            names.append(name)
    return names


def _from_main(work: Callable[[], Result]) -> Result:
    """The main process's result, in all."""
    results = [work() if PartialState().is_main_process else None]
    broadcast_object_list(results)
    assert results[0] is not None
    return results[0]


def _from_all(work: Callable[[], Result]) -> list[Result]:
    """The results of all processes; where it fails in one, all raise."""
    results: list[Result] = []
    failure: OSError | None = None
    try:
        results = [work()]
    except OSError as error:
        failure = error
    gathered = gather_object([(results, str(failure or ""))])
    if failure is not None:
        raise failure
    reasons = [reason for _, reason in gathered if reason]
    if reasons:
        raise JobFailed(f"another process of this job failed: {reasons[0]}")
    return [result for results_of_one, _ in gathered for result in results_of_one]
