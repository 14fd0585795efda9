"""A training job from its recipe to its exported student."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from teachercache.cache import Cache
from teachercache.config import Recipe, StudentConfig, TrainConfig
from teachercache.config.location import folder_name
from teachercache.config.phases import steps_of
from teachercache.console import PlainTextConsole
from teachercache.errors import JobFailed, RecipeError, TeachercacheError
from teachercache.models.memory import first_line, is_out_of_memory
from teachercache.stream.order.batch_plan import BatchPlan, Plan
from teachercache.stream.order.phases import PhasedPlan
from teachercache.stream.sources import Mixed, check_mix, train_order, windows_bytes
from teachercache.stream.withheld import trained_rows
from teachercache.training.checkpoints.completion import (
    MARKER,
    Checkpoint,
    checkpoint_folder,
    exported_damage,
    remove_incomplete,
    whole_checkpoint,
)
from teachercache.training.checkpoints.disk import full_disk_in_a_line
from teachercache.training.job.deepspeed_config import deepspeed_config, own_deepspeed_settings
from teachercache.training.job.launch import Process, lost_another_process, training_process
from teachercache.training.job.run_folder import RunFolder, RunIdentity
from teachercache.training.job.summary import closing_line, speed_and_losses
from teachercache.training.supervision.fit import check_cache, initial_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

    from teachercache.training.job.stopping import Ends
    from teachercache.training.trainer.trainer import DistillationTrainer


def run_training(recipe: Recipe, *, console: Console | None = None) -> dict[str, Any]:
    """Train the recipe's student from its cache. Run again, it resumes; a finished run is left as it is.
    Progress goes to `console` (default: stderr).

    Every process of a launched job calls this and gets the result: `steps`, `rows` and `positions` (trained on, counted
    again in every epoch), `losses` (`total`, `kl`, `ce` and every further term of the last logging window, nats per position;
    `kl` is None without a teacher, and across tokenizers), `positions_per_second` and `waiting_for_data` (share of the time;
    medians of the logging windows), `student` (folder), `best` (`step`, `loss` on held-out rows; None without any),
    `zero_stage`, `seconds` of this call, `resumed_from` (step or None). Only the main process writes; `train.output` must be a
    folder that all see.

    Raises `RecipeError`, `ModelError` or `CacheError` for what does not fit, before the first step; `JobFailed` when
    training diverges, memory or the disk runs out, another of its processes ends, SIGTERM asks it to stop, or another
    job writes to the same folder.
    """
    recipe.require("student", "train")
    cache, *others = _opened(recipe)  # before libraries are imported that take seconds
    mix = [Mixed(other, entry.share) for other, entry in zip(others, recipe.stream.mix, strict=True)]
    for source in (cache, *others):
        check_cache(source)
    check_mix(cache, mix)
    try:
        with training_process() as process:
            shown = console or PlainTextConsole(stderr=True)
            return _Job(recipe, cache, mix, process, shown if process.main else Console(quiet=True)).run()
    except RuntimeError as error:  # out here: torch raises it in whatever runs just then, once more in cleaning up
        if not str(error).startswith("DataLoader worker"):
            raise
        _stop_watching_workers()
        raise JobFailed(
            f"a loading process was killed ({str(error).rstrip(' .')}), most often for want of memory: lower "
            "train.loader_workers; run the same command again to go on from the last checkpoint"
        ) from error


def _opened(recipe: Recipe) -> list[Cache]:
    """The caches of a run; one to which rows or targets were added since the run began, as it was then."""
    stream = recipe.stream
    locations = (recipe.cache, *(entry.cache for entry in stream.mix))
    recorded = RunFolder(recipe.train.output).cache_fingerprints() if recipe.train is not None else ()
    return [
        Cache.open(location, local=stream.local, local_bytes=stream.local_bytes, as_of=fingerprint)
        for location, fingerprint in zip_longest(locations, recorded[: len(locations)])
    ]


class _Job:
    """One call of `run_training` in one process."""

    def __init__(self, recipe: Recipe, cache: Cache, mix: Sequence[Mixed], process: Process, console: Console) -> None:
        from teachercache.training.supervision.choice import supervision_for

        assert recipe.student is not None and recipe.train is not None
        self.recipe, self.cache, self.process, self.console = recipe, cache, process, console
        self.student: StudentConfig = recipe.student
        self.config: TrainConfig = recipe.train
        settings = deepspeed_config(self.config, on_gpu=process.on_gpu)
        self.zero_stage: int = settings["zero_optimization"]["stage"]
        self.folder = RunFolder(self.config.output)
        self.mix = mix
        self.supervision = supervision_for(recipe, self._caches)
        self.trained = trained_rows(self._caches, self.supervision.other_caches)
        base = BatchPlan(
            order=train_order(cache, mix, seed=self.config.seed, window=recipe.stream.window, trained=self.trained),
            global_batch=self.config.global_batch,
            micro_batch=self.config.micro_batch,
            world_size=process.world_size,
        )
        self.steps = self.config.max_steps or steps_of(recipe.phases) or base.steps(self.config.epochs)
        locations = (recipe.cache, *(entry.cache for entry in recipe.stream.mix))
        names = [folder_name(location) for location in locations]
        phases = recipe.phases
        self.plan: Plan = PhasedPlan.of(base, phases, names=names, steps=self.steps) if phases else base
        self.schedule = self.supervision.schedule(steps=self.steps, phases=phases)
        if "scheduler" in settings and any(phase.learning_rate_factor != 1 for phase in phases):
            raise RecipeError(
                f"train.deepspeed: {self.config.deepspeed} has a scheduler of its own, which phases cannot change; take it "
                "out, or leave out their learning_rate_factor"
            )

    def run(self) -> dict[str, Any]:
        began = time.perf_counter()
        identity = RunIdentity(
            self.recipe,
            cache_fingerprint=self.cache.manifest.fingerprint,
            mixed_fingerprints=tuple(mixed.cache.manifest.fingerprint for mixed in self.mix),
            **self.supervision.identity(),
            student_weights=initial_weights(self.student),
            deepspeed=own_deepspeed_settings(self.config),
            held_out=self.trained.share,
        )
        self.folder.check_identity(identity)
        summary = self.folder.summary()
        if summary is not None:
            self._say(f"{self.folder.path} is complete: its student is {self.folder.student}; nothing to do")
            return {**summary, "student": str(self.folder.student)}  # the folder may have been moved
        with full_disk_in_a_line(self.folder.path), self.folder.locked() if self.process.main else nullcontext():
            newest = self.folder.newest_checkpoint()
            trained = newest is not None and newest.step >= self.steps and exported_damage(newest) is None
            resume = newest if trained else self._train(identity)
            return self._finish(resume, began)

    def _train(self, identity: RunIdentity) -> Checkpoint | None:
        """Train to the end; returns the checkpoint that it went on from."""
        self.supervision.check_tokenizers()
        args = self._arguments()  # first: under ZeRO 3 they decide how a model is loaded
        model = self._model()
        for line in self._notes():
            self._say(line)
        with self._failures_in_a_line():
            return self._run_trainer(model, args, identity)

    def _model(self) -> PreTrainedModel:
        from teachercache.models.loading import load_causal_lm

        student = self.student
        model = load_causal_lm(
            student.model,
            revision=student.revision,
            dtype="float32",
            attention=student.attention,
            task=self.supervision.task,
        )
        if student.lora is None:
            return model
        from teachercache.training.initialise.lora import with_adapters

        return with_adapters(model, student.lora, seed=self.config.seed)

    def _notes(self) -> Iterator[str]:
        """Yields lines for people, before training."""
        window, room = self.recipe.stream.window, self.recipe.stream.local_bytes
        needed = windows_bytes(self._caches, window=window, layers=bool(self.recipe.objective.layers))
        needed += windows_bytes(self.supervision.other_caches, window=window, layers=False)
        if needed > room:
            yield (
                f"two windows of shards take up to {needed:,} bytes, stream.local_bytes is {room:,}: shards may be fetched "
                "more than once an epoch; raise it, or lower stream.window"
            )
        if self.config.deepspeed is None and self.zero_stage != self.config.zero_stage:
            yield (
                f"bf16 is trained under ZeRO {self.zero_stage}: under ZeRO {self.config.zero_stage} gradients would be summed "
                "in bf16, which loses small ones"
            )
        if not self._evaluates:
            yield "the cache has no held-out rows: no evaluation, and the last checkpoint is exported"
        for cache in self._caches:
            if cache.is_snapshot:
                yield f"{cache.name} has grown since: it is read as it was under {cache.manifest.fingerprint[:12]}…"
        yield from (*self.supervision.warnings(), *self.trained.lines, *self.supervision.lines())
        if self.process.main:
            with self._ends() as (_, ends):
                yield from ends.warnings()

    @contextmanager
    def _ends(self) -> Iterator[tuple[Path, Ends]]:
        """While it is open, the folder of the tokenizer to export, and what its student stops at."""
        from teachercache.training.job.stopping import Ends

        with self.supervision.exported_tokenizer(self.student) as tokenizer:
            yield tokenizer, Ends.of(self.supervision, tokenizer_folder=tokenizer)

    @contextmanager
    def _failures_in_a_line(self) -> Iterator[None]:
        """Raises what training can fail by as our own errors, with the remedy."""
        try:
            yield
        except TeachercacheError as error:
            raise type(error)(_own_message(error)) from error
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise JobFailed(
                    f"out of memory ({first_line(error)}); lower train.micro_batch, "
                    "set train.gradient_checkpointing, or raise train.zero_stage"
                ) from error
            if self.process.world_size == 1 or not lost_another_process(error):
                raise
            raise JobFailed(
                "another process of this job has ended, and this one with it; run the same command again to go on from "
                "the last whole checkpoint"
            ) from error
        except ValueError as error:
            if not str(error).startswith("Please correct the following DeepSpeed config"):
                raise
            raise RecipeError(f"train.deepspeed: {self.config.deepspeed}: {' '.join(str(error).split())}") from error

    def _run_trainer(self, model: PreTrainedModel, args: TrainingArguments, identity: RunIdentity) -> Checkpoint | None:
        from teachercache.training.callbacks.preemption import StopWhenAsked, sigterm_as_request
        from teachercache.training.callbacks.progress import LogFile, ProgressBar
        from teachercache.training.callbacks.step_losses import ScheduleFile

        bar = ProgressBar(self.console)
        callbacks = [LogFile(self.folder.path / "log.jsonl"), bar] if self.process.main else []
        if self.process.main and self.schedule.changes:
            callbacks.append(ScheduleFile(self.folder.path / "course.jsonl", self.schedule))
        try:
            with sigterm_as_request() as request:
                trainer = self._trainer(model, args, [StopWhenAsked(request), *callbacks])
                if self.process.main:
                    remove_incomplete(self.folder.path)  # first: it may have filled the disk
                    self.folder.claim(identity)
                resume = trainer.newest_checkpoint(say=self._say)
                if resume is not None:
                    self._say(self._resuming(resume))
                trainer.train(resume_from_checkpoint=str(resume.folder) if resume else None)
                trainer.accelerator.wait_for_everyone()
        finally:
            bar.close()
        if trainer.state.global_step < self.steps:
            raise JobFailed(
                f"stopped by SIGTERM after step {trainer.state.global_step} of {self.steps}; its checkpoint is whole: "
                "run the same command again to go on"
            )
        return resume

    def _arguments(self) -> TrainingArguments:
        from teachercache.training.job.arguments import training_arguments

        return training_arguments(
            self.config,
            plan=self.plan,
            steps=self.steps,
            evaluates=self._evaluates,
            on_gpu=self.process.on_gpu,
        )

    def _trainer(self, model: PreTrainedModel, args: TrainingArguments, callbacks: list[Any]) -> DistillationTrainer:
        from teachercache.training.trainer.trainer import DistillationTrainer

        return DistillationTrainer(
            model=model,
            cache=self.cache,
            args=args,
            objective=self.recipe.objective,
            mix=self.mix,
            plan=self.plan,
            trained=self.trained,
            schedule=self.schedule,
            supervision=self.supervision,
            keep_checkpoints=self.config.keep_checkpoints,
            pack=self.config.pack,
            warn=False,  # it is among the notes
            callbacks=callbacks,
        )

    def _finish(self, resume: Checkpoint | None, began: float) -> dict[str, Any]:
        """Export from the checkpoints on disk: also where a job was killed between its last step and its export."""
        from teachercache.training.job.export import export_student

        state = json.loads(self._checkpoint(self.steps).joinpath("trainer_state.json").read_text(encoding="utf-8"))
        best_step = state["best_global_step"]
        summary = {
            **speed_and_losses(state["log_history"]),
            "steps": self.steps,
            "rows": self.plan.rows_before(self.steps),
            "student": str(self.folder.student),
            "best": {"step": best_step, "loss": state["best_metric"]} if best_step else None,
            "zero_stage": self.zero_stage,
            "seconds": round(time.perf_counter() - began, 3),
            "resumed_from": resume.step if resume else None,
            **self.supervision.report(state["log_history"]),
        }
        if self.process.main:
            chosen = self._undamaged(best_step or self.steps)
            with self._ends() as (tokenizer, ends):
                export_student(chosen, config=self.student, tokenizer=tokenizer, ends=ends, student=self.folder.student)
            self.folder.finish(summary)
            self._say(closing_line(summary))
        return summary

    def _undamaged(self, step: int) -> Path:
        """The folder of a checkpoint that is to be exported, once its bytes are checked."""
        folder = self._checkpoint(step)
        checkpoint = whole_checkpoint(folder)
        damage = f"it is gone, or its {MARKER}" if checkpoint is None else exported_damage(checkpoint)
        if damage is not None:
            raise JobFailed(
                f"{folder}, of which the student was to be exported, is damaged ({damage}); restore it from a backup, or "
                f"delete it and the later ones in {self.folder.path} and run the same command again to train them once more"
            )
        return folder

    @property
    def _caches(self) -> list[Cache]:
        return [self.cache, *(mixed.cache for mixed in self.mix)]

    @property
    def _evaluates(self) -> bool:
        return any(cache.rows_of("held-out") for cache in self._caches)

    def _resuming(self, resume: Checkpoint) -> str:
        line, before, now = (
            f"resuming at step {resume.step} of {self.steps}",
            resume.world_size,
            self.process.world_size,
        )
        if before == now:
            return line
        work = f"converting it for {now}" if self.zero_stage > 0 else f"going on with {now}"
        return f"{line}; its checkpoint was written by {before} process{'es' if before > 1 else ''}: {work}"

    def _say(self, message: str) -> None:
        self.console.print(message, soft_wrap=True, highlight=False, markup=False)

    def _checkpoint(self, step: int) -> Path:
        return checkpoint_folder(self.folder.path, step)


def _stop_watching_workers() -> None:
    """The other loading processes end next: torch's handler would raise for the killed one again, wherever we are then."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _own_message(error: TeachercacheError) -> str:
    """The error's line alone: torch puts the traceback of a loading process before it."""
    text = str(error.args[0]) if error.args else ""  # `str(error)` is one line already, with all of that in it
    return text.rstrip().splitlines()[-1].partition(": ")[2] if text.startswith("Caught ") else str(error)
