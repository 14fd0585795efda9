"""A checkpoint that any number of processes can load, made from one that ties itself to the number that wrote it.

Under ZeRO 1-3 every process writes its own shard of the optimizer's state, and DeepSpeed refuses to load shards into
another number of processes. Its converter, `ds_to_universal`, joins them to one file per parameter and kind of state
(float32 weights, both moments), out of which each process reads its slice:

checkpoint-N/global_stepN/      what DeepSpeed wrote; stays as it is
checkpoint-N/universal/         its conversion
checkpoint-N/universal.json     size and sha256 of each of its files
checkpoint-N/latest_universal   written last: the conversion is whole; DeepSpeed looks for it under this name

A conversion takes about the room of the checkpoint itself, and nearly twice that while it is made. It stays until the
next whole checkpoint is there, so that a job which is killed soon again does not convert again. One that is used again is
checked before, and made again where it is damaged.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

from teachercache.cache.files.regular_files import read_regular
from teachercache.errors import JobFailed
from teachercache.files import same_imports, sync_files, write_whole
from teachercache.training.checkpoints.digests import first_damage, read_digests, stored_files, write_digests
from teachercache.training.checkpoints.disk import full_disk_in_a_line, out_of_space, space_error

logger = logging.getLogger(__name__)
UNIVERSAL = "universal"
DIGESTS = "universal.json"
MARKER = "latest_universal"
TEMPORARY = ".universal.tmp"
# Each holds the state of one of the processes that wrote the checkpoint in memory.
WORKERS = 2


def convert(checkpoint: Path) -> None:
    """Make a whole checkpoint's conversion, unless it is there; what a killed job left of one is made again.

    Works in a fresh process, which ends with this one: DeepSpeed's converter forks workers, and a process that takes
    part in collectives must not. One process at a time may call it. Raises `JobFailed` when the disk is full, or when
    DeepSpeed cannot convert what the optimizer keeps (it knows Adam's two moments).
    """
    if (checkpoint / MARKER).exists():
        damage = damage_of(checkpoint)
        if damage is None:
            return
        logger.warning("the conversion of %s is damaged (%s): making it again", checkpoint, damage)
    discard(checkpoint)
    temporary = checkpoint / TEMPORARY
    shards = checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()
    with full_disk_in_a_line(checkpoint.parent):
        _run_converter(shards, temporary / UNIVERSAL)
        sync_files(temporary)
        (temporary / UNIVERSAL).replace(checkpoint / UNIVERSAL)
        write_digests(checkpoint / DIGESTS, stored_files(checkpoint, _names(checkpoint)))
        write_whole(checkpoint / MARKER, UNIVERSAL)
        shutil.rmtree(temporary)


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint's conversion, whole or half."""
    (checkpoint / MARKER).unlink(missing_ok=True)  # first, so that a half deleted one does not count as whole
    (checkpoint / DIGESTS).unlink(missing_ok=True)
    for name in (UNIVERSAL, TEMPORARY):
        shutil.rmtree(checkpoint / name, ignore_errors=True)


def damage_of(checkpoint: Path) -> str | None:
    """Describes the damage to the bytes of a whole conversion; None where there is none."""
    try:
        if read_regular(checkpoint, MARKER, most=64) != UNIVERSAL.encode():
            return f"{MARKER} is not what was written"
        _, files = read_digests(checkpoint / DIGESTS)
        return first_damage(checkpoint, files)
    except (ValueError, OSError):  # whatever it is, the conversion can be made again
        return f"{DIGESTS}, or a file that it names, is not what was written"


def _names(checkpoint: Path) -> list[str]:
    files = [path for path in sorted((checkpoint / UNIVERSAL).rglob("*")) if path.is_file()]
    return [path.relative_to(checkpoint).as_posix() for path in files]


def _run_converter(shards: Path, converted: Path) -> None:
    command = [sys.executable, "-m", "teachercache.training.checkpoints.universal", str(shards), str(converted)]
    environment = {
        **{name: value for name, value in same_imports().items() if name not in {"RANK", "LOCAL_RANK", "WORLD_SIZE"}},
        "DS_ACCELERATOR": "cpu",
    }
    # It is the leader of a group of its own, which it ends as soon as its stdin does: with this process.
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, env=environment, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        errors = process.stderr.read()
    if process.returncode:
        raise _failure(shards.parent, errors)


def _failure(checkpoint: Path, errors: str) -> JobFailed:
    lines = [line for line in errors.splitlines() if line and not line[0].isspace()]
    reason = lines[-1] if lines else "it was killed"
    if out_of_space(RuntimeError(errors)):
        discard(checkpoint)  # half of it would keep others from the little space that is left
        return space_error(checkpoint.parent)
    return JobFailed(
        f"{checkpoint} could not be converted for another number of processes ({reason}); "
        "resume with as many as wrote it, or use another train.output"
    )


def _convert(shards: Path, converted: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    converted.mkdir(parents=True)
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(shards),
            output_folder=str(converted),
            num_extract_workers=WORKERS,
            num_merge_workers=WORKERS,
            keep_temp_folder=False,
            strict=True,
            # How Megatron cuts tensors among processes. We cut none, and without it stages 1 and 2 are refused.
            inject_missing_state=True,
        )
    )


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # nothing is ever written to it
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
