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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from teachercache.config import ObjectiveConfig
from teachercache.objective import NO_TARGET, DistillationObjective, LossTerms
from teachercache.objective.across import AcrossObjective
from teachercache.objective.layers import names_of
from teachercache.shards import Cache
from teachercache.shards.sidecar import Sidecar
from teachercache.stream.batches import BatchPlan, PlanSampler, spread
from teachercache.stream.collate import Collator, MixedCollator
from teachercache.stream.dataset import CacheDataset, Rows
from teachercache.stream.sources import Mixed, check_mix, train_order
from teachercache.student.cadence import Cadence
from teachercache.student.checkpoints import checkpoint_folder, complete_checkpoints, mark_complete, rotate
from teachercache.student.divergence import DivergenceGuard
from teachercache.student.elastic import any_number_of_processes
from teachercache.student.fit import check_joined
from teachercache.student.held_out import AcrossMeasure, HeldOutMeasure, Measure, across_objective
from teachercache.student.layers import (
    check_formed_outside,
    check_trainer,
    layer_objectives,
    logged,
    names_logged,
    watched,
)
from teachercache.student.meter import LOGGED_AS, LossMeter
from teachercache.student.output_layer import loss_for_logits, takes_loss
from teachercache.student.preemption import heed_parent_alone

logger = logging.getLogger(__name__)


class DistillationTrainer(Trainer):
    """Train `model` on the train split of `cache`, and evaluate on its held-out split.

    `plan` says which rows make a step; by default it follows from `args`: micro-batches of
    `per_device_train_batch_size` rows, `gradient_accumulation_steps` of them on each process, order by `seed`.
    `args.max_steps`, else `args.num_train_epochs`, ends the run. The latest `keep_checkpoints` checkpoints are kept and
    the best one besides: leave `args.save_total_limit` alone. `pack` puts short rows of a micro-batch into one sequence
    (isolated, by students for which `fit.check_packing` finds nothing), which changes the time of a step, not its loss.
    `mix` adds further caches of the same tokenizer, whatever their kinds of targets; a micro-batch is of one cache.
    `sidecars`, one a cache, are alignments with the tokenizer of a student that has another one than the teacher.
    Works under DeepSpeed ZeRO 0-3, DDP and in one process.

    Raises `CacheError` when a cache does not hold the objective's temperature or does not mix, `JobFailed` when training
    diverges.
    """

    def __init__(
        self,
        *,
        model: Any,
        cache: Cache,
        args: TrainingArguments,
        objective: ObjectiveConfig,
        mix: Sequence[Mixed] = (),
        plan: BatchPlan | None = None,
        sidecars: Sequence[Sidecar] = (),
        keep_checkpoints: int = 2,
        pack: bool = False,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        check_mix(cache, mix)
        self.caches = (cache, *(mixed.cache for mixed in mix))
        self.objective_config = objective
        self.sidecars = tuple(sidecars)
        self.objectives = [self._objective(number) for number in range(len(self.caches))]
        self.plan = plan or _plan_of(args, cache, mix)
        self.keep_checkpoints = keep_checkpoints
        _run_as_one_pass(args, self.plan)
        self.layer_objectives = layer_objectives(model, objective, self.caches, seed=args.seed)
        columns = [objective.columns for objective in self.objectives]
        if self.layer_objectives:
            columns = [(*names, *each.columns) for names, each in zip(columns, self.layer_objectives, strict=True)]
        if self.sidecars:
            for each, names in zip(self.caches, columns, strict=True):
                check_joined(each, names)
        held_out = sum(each.rows_of("held-out") for each in self.caches)
        use_cache = model.config.use_cache
        super().__init__(
            model=model,
            args=args,
            data_collator=self._collator(columns, pack=pack),  # type: ignore[arg-type]  # of `Rows`, not a list
            train_dataset=CacheDataset(self.caches, "train", columns=columns, sidecars=self.sidecars),
            eval_dataset=CacheDataset(self.caches, "held-out", columns=columns, sidecars=self.sidecars)
            if held_out
            else None,
            callbacks=[Cadence(self.plan), DivergenceGuard(), *(callbacks or [])],
        )
        model.config.use_cache = use_cache  # Trainer turns it off, and would export a student that generates slowly
        self.remove_callback(PrinterCallback)  # it prints to stdout
        self.model_accepts_loss_kwargs = True  # the loss is normalised here, so Trainer must not do it again
        check_trainer(self, self.layer_objectives)
        across = [name for each in self.objectives if isinstance(each, AcrossObjective) for name in each.names]
        names = (*dict.fromkeys(across), *names_logged(self.layer_objectives))
        self.meter = LossMeter(self.accelerator, names)
        self._held_out_loader: DataLoader[Rows] | None = None
        self._fetching: list[list[int]] = []  # shards of each cache
        self._loss_in_layer: bool | None = None  # not tried yet

    def _objective(self, number: int) -> DistillationObjective | AcrossObjective:
        """Of one cache."""
        if self.sidecars:
            return across_objective(self.objective_config, self.caches[number], self.sidecars[number])
        return DistillationObjective(self.objective_config, kind=self.caches[number].kind)

    def _measure(self, number: int) -> Measure:
        """Of the held-out rows of one cache."""
        cache, tail, device = self.caches[number], self.objective_config.tail, self.args.device
        if self.sidecars:
            return AcrossMeasure(cache, self.sidecars[number], tail=tail, device=device)
        return HeldOutMeasure(cache.kind, tail=tail, device=device)

    def _collator(self, columns: Sequence[tuple[str, ...]], *, pack: bool = False) -> MixedCollator:
        joined = self.sidecars or [None] * len(self.caches)
        paired = zip(self.caches, columns, joined, strict=True)
        return MixedCollator(
            tuple(Collator.of(cache, columns=names, pack=pack, sidecar=sidecar) for cache, names, sidecar in paired)
        )

    def get_train_dataloader(self) -> DataLoader[Rows]:
        """This process's micro-batches from the current step on; accelerate must not shard them again."""
        sampler = PlanSampler(
            self.plan,
            rank=self.args.process_index,
            steps=self.args.max_steps,
            first_step=lambda: self.state.global_step,
            upcoming=self._prefetch,
        )
        return self._loader(self.train_dataset, sampler, self.data_collator)

    def _prefetch(self, step: int) -> None:
        """Have the shards of this window and the next one fetched, where caches are in an object store."""
        shards = self.plan.order.shards_at(*self.plan.place(step))
        if shards != self._fetching:
            self._fetching = shards
            for number, (cache, numbers) in enumerate(zip(self.caches, shards, strict=True)):
                beside = self.sidecars[number].infos if self.sidecars else ()
                cache.prefetch(numbers, caches=sum(each.is_remote for each in self.caches), with_infos=beside)

    def _loader(self, dataset: Any, batch_sampler: Any, collator: Any, **settings: Any) -> DataLoader[Rows]:
        return DataLoader(
            dataset,
            batch_sampler=batch_sampler,
            collate_fn=collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            # Left to the global generator, starting workers would shift the dropout of a resumed run.
            generator=torch.Generator().manual_seed(self.args.seed),
            **self._workers(),
            **settings,
        )

    def _workers(self) -> dict[str, Any]:
        """Loading processes are forked, but for caches in object stores: a fork inherits locks of the stores' clients, whose
        threads it does not have, and now and then waits for one forever."""
        if self.args.dataloader_num_workers == 0 or not any(each.is_remote for each in self.caches):
            return {}
        return {"multiprocessing_context": "spawn", "worker_init_fn": heed_parent_alone}

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """The micro-batches of one optimizer step, and the positions of all of its micro-batches on all processes."""
        with self.meter.waiting():
            batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        if not batches:
            return [], None
        positions = sum(int((batch["shift_labels"] != NO_TARGET).sum()) for batch in batches)
        return batches, self.accelerator.reduce(torch.tensor(positions, device=device), "sum")

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # Trainer would also cast the teacher's targets to the student's precision, and bf16 ruins log-partitions.
        return _to_device(inputs, self.args.device)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the global batch's mean loss. Calls the wrapped model, never `model.module`."""
        inputs = dict(inputs)
        terms, outputs = self._terms(model, inputs, inputs.pop("source"))
        self.meter.add(terms)
        positions = terms.positions if num_items_in_batch is None else num_items_in_batch
        # DeepSpeed and DDP average gradients over processes where the mean over positions needs their sum.
        loss = terms.total * (self.accelerator.num_processes / _at_least_one(positions))
        return (loss, outputs) if return_outputs else loss

    def _terms(self, model: Any, inputs: dict[str, Any], source: int) -> tuple[LossTerms, Any]:
        """The loss, formed where logits would be, if the student's output layer allows it; with it that of layers."""
        objective, layers = self.objectives[source], inputs.pop("layers", None)
        labels_BS, targets = inputs.pop("shift_labels"), inputs.pop("targets")
        matched = self.layer_objectives[source] if self.layer_objectives else None
        in_layer = self._forms_loss_in_layer(model)
        formed: list[LossTerms] = []
        with watched(self.model, matched) as activations:

            def add_layers(terms: LossTerms) -> torch.Tensor:
                for each in self.layer_objectives:  # in one order in all processes, whatever caches they are at
                    if each is matched:
                        found = each.loss(activations, layers, labels_BS)
                        terms = replace(terms, total=terms.total + found.total, named={**terms.named, **logged(found)})
                    else:
                        terms = replace(terms, total=terms.total + each.idle(terms.total))
                formed.append(terms)
                return terms.total

            def loss(hidden: Any, weight: Any, bias: Any, softcap: float | None) -> torch.Tensor:
                return add_layers(objective.projected(hidden, weight, bias, labels_BS, targets, softcap=softcap))

            if not in_layer:
                check_formed_outside(model, matched)
                outputs = model(**inputs, use_cache=False)
                add_layers(objective(outputs.logits, labels_BS, targets))
                return formed[-1], outputs
            with loss_for_logits(self.model, loss):
                outputs = model(**inputs, use_cache=False)
        return replace(formed[-1], total=outputs.logits.reshape(())), outputs

    def _forms_loss_in_layer(self, model: Any) -> bool:
        """Found out at the first batch, by all processes at once."""
        if self._loss_in_layer is None:
            # Replicas of `nn.DataParallel` would share one patched layer.
            self._loss_in_layer = self.args.n_gpu <= 1 and takes_loss(self.model, model)
            if not self._loss_in_layer and self.is_world_process_zero():
                logger.warning(
                    "%s: logits of whole batches are formed, its output layer is not plain", type(self.model).__name__
                )
        return self._loss_in_layer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; training records carry the loss by term, per position, over the window and all processes."""
        if "train_runtime" in logs:
            return  # Trainer's closing summary counts a resumed run's earlier steps as if they had run now
        super().log({**logs, **self._window()} if "loss" in logs else logs, start_time)

    def _window(self) -> dict[str, float]:
        window = self.meter.take()
        config = self.objective_config
        with_teacher = {"temperature": config.temperature}
        if not self.sidecars:
            with_teacher[LOGGED_AS[config.divergence]] = window.divergence
        elif config.alpha > 0:
            with_teacher |= {f"weight_{term.match}": term.weight for term in config.across}
        return {
            "loss": window.total,
            "ce": window.ce,
            **(with_teacher if config.alpha > 0 else {}),
            "alpha": config.alpha,
            **window.named,
            **{
                f"weight_{name}": term.weight for name, term in zip(names_of(config.layers), config.layers, strict=True)
            },
            "positions": window.positions,
            "positions_per_second": window.positions_per_second,
            "waiting_for_data": window.waiting,
        }

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out metrics over all processes, logged and handed to callbacks; see `held_out.HeldOutMeasure`."""
        if eval_dataset is not None:
            raise ValueError("evaluation is on the cache's held-out split; open another cache for other rows")
        began = time.perf_counter()
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        measures = [self._measure(number) for number in range(len(self.caches))]
        in_layer = self.model if self._forms_loss_in_layer(model) else None
        for batch in self._held_out_batches([measure.columns for measure in measures]):
            measures[batch.pop("source")].add(model, [self._prepare_inputs(batch)], in_layer_of=in_layer)
        model.train(was_training)
        metrics = self._held_out_metrics(measures, prefix=metric_key_prefix)
        metrics[f"{metric_key_prefix}_seconds"] = time.perf_counter() - began
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _held_out_metrics(self, measures: Sequence[Measure], *, prefix: str) -> dict[str, float]:
        """Over all held-out rows; where there are several caches, of each besides: `eval_cache0_loss`, …"""
        sums = [self.accelerator.reduce(measure.sums, "sum") for measure in measures]
        metrics = measures[0].metrics(sum(sums[1:], sums[0]), prefix=prefix)
        if len(sums) > 1:
            for number, of_cache in enumerate(sums):
                if self.caches[number].rows_of("held-out"):
                    metrics |= measures[0].metrics(of_cache, prefix=f"{prefix}_cache{number}")
        return metrics

    def _held_out_batches(self, columns: Sequence[tuple[str, ...]]) -> DataLoader[Rows]:
        """Kept from one evaluation to the next: its workers hold shards open that they have checked."""
        if self._held_out_loader is None:
            rows = [each.rows_of("held-out") for each in self.caches]
            batches = [
                batch
                for number, count in enumerate(rows)
                for batch in spread(
                    count,
                    start=sum(rows[:number]),
                    micro_batch=self.args.per_device_train_batch_size,
                    rank=self.args.process_index,
                    world_size=self.args.world_size,
                )
            ]
            self._held_out_loader = self._loader(
                CacheDataset(self.caches, "held-out", columns=columns, sidecars=self.sidecars),
                batches,
                self._collator(columns),
                persistent_workers=self.args.dataloader_num_workers > 0,
            )
        return self._held_out_loader

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = checkpoint_folder(self._run, self.state.global_step)
            mark_complete(folder, world_size=self.args.world_size)
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
        """Train; `resume_from_checkpoint=True` goes on from the newest whole checkpoint, if there is one. Any number of
        processes may go on from a checkpoint of any other, see elastic.py."""
        if resume_from_checkpoint is True:
            found = complete_checkpoints(self._run)
            resume_from_checkpoint = str(found[-1].folder) if found else None
        try:
            with any_number_of_processes(self, resume_from_checkpoint or None):
                return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            self._held_out_loader = None  # now: a worker that is left to garbage collection takes 5 s to end

    @property
    def _run(self) -> Path:
        return Path(str(self.args.output_dir))


def _plan_of(args: TrainingArguments, cache: Cache, mix: Sequence[Mixed]) -> BatchPlan:
    micro_batch = args.per_device_train_batch_size
    return BatchPlan(
        order=train_order(cache, mix, seed=args.seed),
        global_batch=micro_batch * args.gradient_accumulation_steps * args.world_size,
        micro_batch=micro_batch,
        world_size=args.world_size,
    )


def _run_as_one_pass(args: TrainingArguments, plan: BatchPlan) -> None:
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
