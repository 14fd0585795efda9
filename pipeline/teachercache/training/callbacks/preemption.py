"""SIGTERM, by which schedulers take a machine back: finish the step, save a checkpoint, and end.

Slurm sends it to every process of a job, those that load data included, and the launcher above sends it to its processes
once more. So a request may come several times, and only SIGINT or SIGKILL ends the process at once: then the run goes on
from the last whole checkpoint.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.util import register_after_fork

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from teachercache.stream.loading_process import heed_parent_alone

# Steps between agreements of several processes: each costs a collective, and waits for the device.
AGREE_EVERY = 4


class Request:
    """Request to stop that this process may have got."""

    asked = False


@contextmanager
def sigterm_as_request() -> Iterator[Request]:
    """While it is open, SIGTERM only sets the request, and ends no process that multiprocessing forks meanwhile, unless
    this one sent it. Anywhere but in the main thread nothing changes."""
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def ask(*_: object) -> None:
        request.asked = True

    register_after_fork(request, heed_parent_alone)
    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)


class StopWhenAsked(TrainerCallback):
    """Saves and ends after a step, in all processes at the same one, when any of them was asked to."""

    def __init__(self, request: Request) -> None:
        self._request = request

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if state.global_step < state.max_steps and self._agreed(args, state):
            control.should_save = control.should_log = control.should_training_stop = True

    def _agreed(self, args: TrainingArguments, state: TrainerState) -> bool:
        if args.world_size == 1:
            return self._request.asked
        if state.global_step % AGREE_EVERY:
            return False
        asked = torch.tensor(int(self._request.asked), device=args.device)
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        return bool(asked)
