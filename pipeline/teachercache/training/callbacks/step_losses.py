"""Parts of a run that follow its losses: told them after every step, logged at every step, saved with every checkpoint.

The losses are those of the global batch, so that every process settles on the same numbers, however many there are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from teachercache.files import write_whole
from teachercache.objective import LossTerms
from teachercache.objective.logits.operands import Weights
from teachercache.objective.objective_schedule import ObjectiveSchedule

STATE = "objective_state.json"


class Stateful(Protocol):
    """Something that a run remembers, beyond what Trainer saves."""

    def state_dict(self) -> dict[str, Any]:
        """As JSON."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""


class StepLosses(TrainerCallback):
    """Sums of a step's losses over its micro-batches. After the last one the schedule hears their means over all processes: one
    small collective a step, and only where something follows them. Add it to a trainer's callbacks."""

    def __init__(self, schedule: ObjectiveSchedule) -> None:
        self.schedule = schedule
        self.accelerator: Any = None  # once the trainer has one
        self._sums_3: Tensor | None = None  # what alpha weighs, cross-entropy, positions

    def add(self, terms: LossTerms) -> None:
        """One micro-batch."""
        if not self.schedule.adapts:
            return
        weighed = terms.divergence if terms.weighed is None else terms.weighed
        sums_3 = torch.stack(
            [weighed.detach(), terms.ce.detach(), terms.ce.new_tensor(float(terms.positions))]
        ).double()
        self._sums_3 = sums_3 if self._sums_3 is None else self._sums_3 + sums_3

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self._sums_3 is None:
            return
        weighed, ce, positions = self.accelerator.reduce(self._sums_3, "sum").tolist()
        self._sums_3 = None
        if positions:
            self.schedule.update(state.global_step - 1, distillation=weighed / positions, ce=ce / positions)


class ScheduleFile(TrainerCallback):
    """Writes the values of the schedule in each step, a line of JSON each. A resumed run first goes back to its
    checkpoint's step."""

    def __init__(self, path: Path, schedule: ObjectiveSchedule) -> None:
        self._path, self._schedule = path, schedule

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        kept = _lines_until(self._path, state.global_step) if self._path.is_file() else []
        write_whole(self._path, "".join(line + "\n" for line in kept))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        step = state.global_step
        record = {"step": step + 1, **schedule_record(self._schedule, self._schedule.at(step), step=step)}
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")


def _lines_until(path: Path, step: int) -> list[str]:
    """Those of the first `step` steps; of a file that a full disk or a power cut left damaged, those before the damage."""
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, TypeError, KeyError):
            break
        kept.append(line.decode("utf-8"))
    return kept


def schedule_record(schedule: ObjectiveSchedule, weights: Weights, *, step: int) -> dict[str, Any]:
    """Returns the values of the schedule in a step, by the names that logs give them."""
    phase = schedule.phase_at(step)
    return {
        **({"phase": phase} if phase is not None else {}),
        "alpha": weights.alpha,
        **({"temperature": weights.temperature} if weights.alpha > 0 else {}),
        **{f"weight_{name}": weight for name, weight in weights.terms.items()},
    }


def save_state(checkpoint: Path, adaptive: Mapping[str, Stateful]) -> None:
    """Into a checkpoint's folder; nothing where nothing remembers anything."""
    states = {name: state for name, part in adaptive.items() if (state := part.state_dict())}
    if states:
        write_whole(checkpoint / STATE, json.dumps(states, indent=1) + "\n")


def load_state(checkpoint: Path, adaptive: Mapping[str, Stateful]) -> None:
    """Inverse of `save_state`."""
    path = checkpoint / STATE
    states = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name, part in adaptive.items():
        if name in states:
            part.load_state_dict(states[name])
