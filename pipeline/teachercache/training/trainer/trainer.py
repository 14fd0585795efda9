"""`DistillationTrainer`: `transformers.Trainer` on a cache.

Checkpoints, schedules, callbacks and trackers are the library's. What is different here:

- The whole run is one pass over a `BatchPlan`, so that the optimizer step is the only cursor: resuming is a seek.
- A loss is divided by the positions of the *global* batch, over micro-batches and processes, so that the number of
  processes does not change what is learned.
- The loss is formed inside the student's output layer, in chunks: a batch's logits never exist, in training or evaluation,
  unless the student does more to them than a soft cap.
- A checkpoint counts only once its last file is written, and the best one by held-out loss is kept.

Shapes: B rows, S tokens.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from teachercache.cache import Cache
from teachercache.config import ObjectiveConfig
from teachercache.errors import JobFailed, RecipeError
from teachercache.models.loading import takes_one_row
from teachercache.models.rotary import original_context, rotate_by_own_length
from teachercache.objective import NO_TARGET
from teachercache.objective.objective_schedule import ObjectiveSchedule
from teachercache.stream.dataset import Rows
from teachercache.stream.order.batch_plan import BatchPlan, Plan, PlanSampler
from teachercache.stream.sources import Mixed, check_mix, train_order
from teachercache.stream.withheld import Trained, trained_rows
from teachercache.training.callbacks.log_and_save import LogAndSaveCallback
from teachercache.training.callbacks.meter import LossMeter
from teachercache.training.callbacks.record import training_record
from teachercache.training.callbacks.step_losses import Stateful, StepLosses, load_state, save_state, schedule_record
from teachercache.training.callbacks.stop_on_divergence import StopOnDivergence
from teachercache.training.checkpoints.completion import (
    Checkpoint,
    checkpoint_folder,
    mark_complete,
    rotate,
    whole_checkpoint,
)
from teachercache.training.checkpoints.elastic import any_number_of_processes
from teachercache.training.checkpoints.resuming import damage_of, intact_checkpoint, written_files
from teachercache.training.initialise.partitioned import exact_buffers, like_partitioned
from teachercache.training.supervision.choice import supervision_of
from teachercache.training.supervision.contract import Supervision
from teachercache.training.supervision.fit import Fit
from teachercache.training.supervision.reading import Reading
from teachercache.training.trainer.batch_loss import BatchLoss
from teachercache.training.trainer.gradient_cosines import cosines_of
from teachercache.training.trainer.held_out_pass import HeldOutPass
from teachercache.training.trainer.layers import check_trainer
from teachercache.training.trainer.learning_rate import with_factors
from teachercache.training.trainer.objectives import Objectives
from teachercache.training.trainer.routing import ROUTING_PASS, ROUTING_PASSES, routing_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class DistillationTrainer(Trainer):
    """Train `model` on the train split of `cache`, and evaluate on its held-out split.

    `plan` says which rows make a step; by default it follows from `args`: micro-batches of
    `per_device_train_batch_size` rows, `gradient_accumulation_steps` of them on each process, order by `seed`.
    `args.max_steps`, else `args.num_train_epochs`, ends the run. The latest `keep_checkpoints` checkpoints are kept and
    the best one besides: leave `args.save_total_limit` alone. `pack` puts short rows of a micro-batch into one sequence
    (isolated, by students that keep them apart), which changes the time of a step, not its loss.
    Documents that any of the caches holds out train in none: `trained` says which rows are left (default: as
    `stream.withheld.trained_rows` finds them), and a `plan` of one's own is made of these (`train_order(…, trained=…)`).
    `mix` adds further caches of the same tokenizer, whatever their kinds of targets; a micro-batch is of one cache.
    `schedule` says what the objective is at each step, by default what `objective` says; what `adaptive` holds is saved with
    checkpoints.
    `supervision` says what is learned from the caches, by default the distributions of their teachers in the student's own
    tokens; `training.supervision.choice.supervision_of` gives it for alignments or for several teachers.
    What the supervision warns of, such as rows of an earlier version that do not begin as their tokenizer has it, is logged
    once, unless `warn` is false.
    Works under DeepSpeed ZeRO 0-3, DDP and in one process.

    Raises `RecipeError` for a `supervision` of other caches or of another objective,
    `CacheError` when a cache does not hold the objective's temperature or does not mix, `ModelError` for a student that
    cannot learn from them (`fit.Fit`), `JobFailed` when training diverges.
    """

    def __init__(
        self,
        *,
        model: Any,
        cache: Cache,
        args: TrainingArguments,
        objective: ObjectiveConfig,
        mix: Sequence[Mixed] = (),
        plan: Plan | None = None,
        trained: Trained | None = None,
        schedule: ObjectiveSchedule | None = None,
        supervision: Supervision | None = None,
        keep_checkpoints: int = 2,
        pack: bool = False,
        warn: bool = True,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        check_mix(cache, mix)
        exact_buffers(model)
        self.caches = (cache, *(mixed.cache for mixed in mix))
        self.objective_config = objective
        self.supervision = supervision or supervision_of(self.caches, objective)
        self.supervision.check_run(self.caches, objective)
        if warn and args.process_index == 0:
            for line in self.supervision.warnings():
                logger.warning(line)
        self.fit = Fit(self.supervision, pack=pack)
        self.fit.check(model)
        trained = trained or _trained(self.supervision, plan)
        rotate_by_own_length(model)
        self.reading = Reading(
            self.supervision, args, trained, one_row=takes_one_row(model), context=original_context(model)
        )
        self.plan = plan or _plan_of(args, cache, mix, trained)
        self.keep_checkpoints = keep_checkpoints
        _run_as_one_pass(args, self.plan)
        self.routing = routing_of(model, objective.routing, args)
        self.schedule = schedule or self.supervision.schedule(steps=args.max_steps)
        self.weights = self.schedule.at(0)  # of the step that is under way
        self.adaptive: dict[str, Stateful] = {"course": self.schedule, **self.supervision.adaptive}
        self.objectives = Objectives.of(model, self.supervision, self.schedule.schedule_range, seed=args.seed)
        like_partitioned(model)
        self._start(model, args, callbacks or [], pack=pack)

    def _start(self, model: Any, args: TrainingArguments, callbacks: list[TrainerCallback], *, pack: bool) -> None:
        """Have Trainer make itself, and then what needs its accelerator."""
        use_cache, columns = vars(model.config).get("use_cache"), self.objectives.columns
        self.step_losses = StepLosses(self.schedule)
        has_held_out = any(cache.rows_of("held-out") for cache in self.caches)
        super().__init__(
            model=model,
            args=args,
            data_collator=self.reading.collator("train", columns, pack=pack),  # type: ignore[arg-type]  # of `Rows`, not a list
            train_dataset=self.reading.dataset("train", columns),
            eval_dataset=self.reading.dataset("held-out", columns) if has_held_out else None,
            callbacks=[self.step_losses, LogAndSaveCallback(self.plan), StopOnDivergence(), *callbacks],
        )
        _restore_use_cache(model.config, use_cache)
        self.remove_callback(PrinterCallback)  # it prints to stdout
        self.model_accepts_loss_kwargs = True  # the loss is normalised here, so Trainer must not do it again
        self.step_losses.accelerator = self.accelerator
        check_trainer(self, self.objectives.of_layers)
        self.meter = LossMeter(self.accelerator, self.objectives.names)
        self.cosines = cosines_of(
            self.objective_config, self.accelerator, layers=self.objectives.of_layers,
            divergence_name=self.supervision.divergence_name,
        )  # fmt: skip
        self.batch_loss = BatchLoss(
            self.model, self.objectives, self.routing, self.cosines, replicated=args.n_gpu > 1,
            warns=self.is_world_process_zero(),
        )  # fmt: skip
        self.held_out_pass = HeldOutPass(self.reading)
        self._fetching: list[list[int]] = []  # shards of each cache
        self._checked: Path | None = None  # the checkpoint whose bytes were found to be as they were written

    def get_train_dataloader(self) -> DataLoader[Rows]:
        """This process's micro-batches from the current step on; accelerate must not shard them again."""
        sampler = PlanSampler(
            self.plan,
            rank=self.args.process_index,
            steps=self.args.max_steps,
            first_step=lambda: self.state.global_step,
            upcoming=self._prefetch,
            presented=1 if self.routing is None else len(ROUTING_PASSES),
        )
        return self.reading.loader(self.train_dataset, sampler, self.data_collator)

    def _prefetch(self, step: int) -> None:
        """Have the shards of this window and the next one fetched, where caches are in an object store."""
        shards = self.plan.shards_at(step)
        if shards != self._fetching:
            self._fetching = shards
            self.supervision.prefetch(shards, self.objectives.columns)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """The micro-batches of one optimizer step, and the positions of all of its micro-batches on all processes.

        Trainer counts on as many in every step: one with fewer begins with empty ones, which are not run.
        """
        self.weights = self.schedule.at(self.state.global_step)
        count = self.plan.micro_steps_at(self.state.global_step)
        with self.meter.waiting():
            batches = [batch for _, batch in zip(range(count), epoch_iterator, strict=False)]
        if not batches:
            return [], None
        positions = sum(int((batch["shift_labels"] != NO_TARGET).sum()) for batch in batches)
        if self.routing is not None:
            batches = self.routing.presented(batches)
        not_run: list[Any] = [{} for _ in range(num_batches - len(batches))]
        return not_run + batches, self.accelerator.reduce(torch.tensor(positions, device=device), "sum")

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward pass of a micro-batch, but for those that only fill up a step."""
        if not inputs:
            return torch.zeros((), device=self.args.device)
        return super().training_step(model, inputs, num_items_in_batch)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As Trainer estimates them."""
        return super().floating_point_ops(inputs) if inputs else 0

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # Trainer would also cast the teacher's targets to the student's precision, and bf16 ruins log-partitions.
        on_device: dict[str, Any] = _to_device(inputs, self.args.device)
        return on_device

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the global batch's mean loss. Calls the wrapped model, never `model.module`."""
        self.fit.check_wrapped(model, cast("PreTrainedModel", self.model))
        inputs = dict(inputs)
        if self.routing is not None:
            self.routing.routing_pass = inputs.pop(ROUTING_PASS)
        terms, outputs = self.batch_loss.of(model, inputs, self.weights, step=self.state.global_step)
        self.meter.add(terms)
        self.step_losses.add(terms)
        positions = terms.positions if num_items_in_batch is None else num_items_in_batch
        # DeepSpeed and DDP average gradients over processes where the mean over positions needs their sum.
        loss = terms.total * (self.accelerator.num_processes / _at_least_one(positions))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; training records carry the loss by term, per position, over the window and all processes."""
        if "train_runtime" in logs:
            return  # Trainer's closing summary counts a resumed run's earlier steps as if they had run now
        if "loss" in logs:
            held = schedule_record(self.schedule, self.weights, step=self.state.global_step - 1)
            record = training_record(self.meter.take(), held, divergence_name=self.supervision.divergence_name)
            logs = {**logs, **record, **({} if self.cosines is None else self.cosines.take())}
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out metrics over all processes, logged and handed to callbacks; see `supervision.held_out`."""
        if eval_dataset is not None:
            raise ValueError("evaluation is on the cache's held-out split; open another cache for other rows")
        began = time.perf_counter()
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        metrics = self.held_out_pass.metrics(
            model, in_layer_of=self.model if self.batch_loss.forms_in_layer(model) else None,
            prepare=self._prepare_inputs, accelerator=self.accelerator, prefix=metric_key_prefix,
        )  # fmt: skip
        model.train(was_training)
        self.supervision.on_evaluate(metrics, prefix=metric_key_prefix)
        metrics[f"{metric_key_prefix}_seconds"] = time.perf_counter() - began
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Trainer's, times the factor of each step's phase."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        return with_factors(scheduler, self.schedule.learning_rate_factor)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = checkpoint_folder(self._run, self.state.global_step)
        if self.args.should_save:
            save_state(folder, self.adaptive)
        self.accelerator.wait_for_everyone()
        files = written_files(folder)
        if self.args.should_save:
            mark_complete(folder, world_size=self.args.world_size, files=files)
            rotate(self._run, keep=self.keep_checkpoints, best_step=self.state.best_global_step)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # DeepSpeed hands over copies, in which tied weights are no longer seen to be one and would be stored twice.
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        if state_dict is not None:
            state_dict = {name: weights for name, weights in state_dict.items() if tied.get(name) not in state_dict}
        super()._save(output_dir, state_dict)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """Train; `resume_from_checkpoint=True` goes on from the newest undamaged checkpoint, if there is one. Any number of
        processes may go on from a checkpoint of any other, see elastic.py. Raises `JobFailed` for a damaged one."""
        if resume_from_checkpoint is True:
            newest = self.newest_checkpoint()
            resume_from_checkpoint = str(newest.folder) if newest else None
        if resume_from_checkpoint:
            self._check(Path(resume_from_checkpoint))
            load_state(Path(resume_from_checkpoint), self.adaptive)
        try:
            with any_number_of_processes(self, resume_from_checkpoint or None):
                return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            self.held_out_pass.close()

    def newest_checkpoint(self, *, say: Callable[[str], None] = logger.warning) -> Checkpoint | None:
        """The newest undamaged checkpoint of the run; see `resuming.intact_checkpoint`. All processes must ask."""
        checkpoint = intact_checkpoint(self._run, say=say)
        self._checked = checkpoint.folder if checkpoint else None
        return checkpoint

    def _check(self, folder: Path) -> None:
        checkpoint = whole_checkpoint(folder)
        damage = damage_of(checkpoint) if checkpoint is not None and folder != self._checked else None
        if damage is not None:
            raise JobFailed(f"{folder} is damaged ({damage}); go on from another checkpoint")

    @property
    def _run(self) -> Path:
        return Path(str(self.args.output_dir))


def _trained(supervision: Supervision, plan: Plan | None) -> Trained:
    trained = trained_rows(supervision.caches, supervision.other_caches)
    if plan is not None and trained.lines:
        raise RecipeError(
            f"{trained.lines[0]}; the plan was made of all rows: make it with train_order(…, trained=trained_rows(…)), and "
            "give `trained` too"
        )
    for line in trained.lines:
        logger.warning("%s", line)
    return trained


def _plan_of(args: TrainingArguments, cache: Cache, mix: Sequence[Mixed], trained: Trained) -> BatchPlan:
    micro_batch = args.per_device_train_batch_size
    return BatchPlan(
        order=train_order(cache, mix, seed=args.seed, trained=trained),
        global_batch=micro_batch * args.gradient_accumulation_steps * args.world_size,
        micro_batch=micro_batch,
        world_size=args.world_size,
    )


def _restore_use_cache(config: Any, before: bool | None) -> None:
    """Trainer turns it off, and would export a student that generates slowly; a composite config has it in its text config."""
    if before is None:
        vars(config).pop("use_cache", None)
    else:
        config.use_cache = before


def _run_as_one_pass(args: TrainingArguments, plan: Plan) -> None:
    """Settings without which the plan would not be what is run."""
    if args.max_steps <= 0:
        args.max_steps = plan.steps(args.num_train_epochs)
    args.gradient_accumulation_steps = plan.micro_steps
    args.ignore_data_skip = True  # the sampler itself begins at the restored step
    args.remove_unused_columns = False
    args.logging_nan_inf_filter = False  # it would hide a diverging run


def _to_device(data: Any, device: torch.device) -> Any:
    if isinstance(data, Mapping):
        return {name: _to_device(value, device) for name, value in data.items()}
    return data.to(device, non_blocking=True) if isinstance(data, torch.Tensor) else data


def _at_least_one(positions: torch.Tensor | int) -> Any:
    return positions.clamp_min(1) if isinstance(positions, torch.Tensor) else max(positions, 1)
