"""Progress of a run, for users, while it goes on: a progress bar on stderr, and OUTPUT/log.jsonl to read or plot."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProgressBar(TrainerCallback):
    """Steps, loss and speed; where stderr is no terminal, one line for every log record instead."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("[bold]train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self._task = self._bar.add_task("train", total=state.max_steps, completed=state.global_step, note="")
        self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        note = _note(logs or {})
        if self._console.is_terminal and "loss" in (logs or {}):
            self._bar.update(self._task, note=note)
        elif note:
            # Nobody reads any more, as when a launcher's connection breaks: rich would end the process before it saves.
            with suppress(SystemExit):
                self._console.print(
                    f"step {state.global_step}/{state.max_steps}  {note}", soft_wrap=True, highlight=False
                )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back, also after a failure."""
        self._bar.stop()


def _note(logs: dict[str, float]) -> str:
    if "eval_loss" in logs:
        loss, perplexity, agreement = (logs[f"eval_{name}"] for name in ("loss", "perplexity", "top1_agreement"))
        return f"held-out loss {loss:.4f}, perplexity {perplexity:.2f}, agreement {agreement:.1%}"
    if "loss" in logs:
        waiting = f"  {logs['waiting_for_data']:.0%} waiting for data" if logs["waiting_for_data"] >= 0.05 else ""
        return f"loss {logs['loss']:.4f}  {logs['positions_per_second']:,.0f} positions/s{waiting}"
    return ""


class LogFile(TrainerCallback):
    """One JSON object for every log record. A resumed run first goes back to what its checkpoint knew."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(_line(record) for record in state.log_history), encoding="utf-8")
        temporary.replace(self._path)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(_line(state.log_history[-1]))


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"
