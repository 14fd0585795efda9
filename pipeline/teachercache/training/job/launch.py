"""Processes of a training job: alone, or one of those that `deepspeed --no_local_rank` or `torchrun` started.

Both launchers speak through the same environment variables, which is the one interface that DeepSpeed, accelerate and
torch.distributed share. A process that nobody launched becomes a world of one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """This process among those of the job; `main` is the one that writes files and prints."""

    rank: int
    world_size: int
    on_gpu: bool

    @property
    def main(self) -> bool:
        """Tells whether this is the process with rank 0."""
        return self.rank == 0


@contextlib.contextmanager
def training_process() -> Iterator[Process]:
    """Make the environment fit for DeepSpeed while a training job runs, and leave no trace of it afterwards.

    Several jobs, one after the other, may run in one process. Call it before transformers or deepspeed are imported
    where that is possible: DeepSpeed picks its accelerator at import.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    variables = {"HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not on_gpu:
        variables["DS_ACCELERATOR"] = "cpu"  # else it warns that it found no GPU
        variables["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))  # else accelerate sets it, with a warning
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        variables |= _world_of_one()
    missing = {name: value for name, value in variables.items() if name not in os.environ}
    with _environment(missing), warnings.catch_warnings(), _discarded_prints():
        warnings.simplefilter("ignore", FutureWarning)  # DeepSpeed calls what torch will rename
        try:
            _send_logs_to_stderr()
            _skip_compilation()
            yield Process(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), on_gpu)
        finally:
            _leave()


def lost_another_process(error: BaseException) -> bool:
    """Tells whether an error says that another process of the job is gone, of which the launcher or its own line tells
    why."""
    words = str(error).lower()
    return any(known in words for known in ("connection closed by peer", "connection reset by peer", "broken pipe"))


def _world_of_one() -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = set(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in set(os.environ) - before:
            if name in variables or name.startswith("ACCELERATE_"):
                del os.environ[name]


@contextlib.contextmanager
def _discarded_prints() -> Iterator[None]:
    """Drop what libraries print() while they train, which is memory reports; warnings and errors are logged."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _send_logs_to_stderr() -> None:
    """Warnings and worse, on stderr: stdout belongs to the result. DeepSpeed's own logger writes to stdout."""
    import deepspeed.utils
    import transformers

    transformers.logging.set_verbosity_warning()
    transformers.logging.disable_progress_bar()
    deepspeed.utils.logger.setLevel(logging.WARNING)
    deepspeed.utils.logger.handlers.clear()
    deepspeed.utils.logger.propagate = True
    # It warns that Trainer accumulates gradients itself, which is what is meant.
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)


def _skip_compilation() -> None:
    """On a CPU DeepSpeed would first compile a collective that only its inference engine calls: most of a minute, and
    it takes a compiler."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _leave() -> None:
    """Forget what DeepSpeed, accelerate and transformers keep in module globals."""
    import deepspeed.comm.comm as deepspeed_comm
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    if deepspeed_comm.cdb is not None and deepspeed_comm.cdb.is_initialized():
        deepspeed_comm.destroy_process_group()
    deepspeed_comm.cdb = None
    AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()
