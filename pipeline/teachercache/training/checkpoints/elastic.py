"""Go on from a checkpoint with another number of processes than wrote it.

What a step learns does not depend on their number: `BatchPlan` gives the same global batches, losses are divided by the
positions of the global batch, and schedules count steps. What does depend on it is

- the optimizer's state under ZeRO 1-3, which the main process converts once for all (universal.py), and DeepSpeed loads
  if its configuration says `checkpoint.load_universal`. Nobody passes that on to it: the setting is there for the load
  alone, so that neither a run's identity nor its next checkpoints know of it;
- the random states, of which each process saved its own. In another number of processes each begins with a seed that
  is a pure function of (seed, step, process): dropout differs from an uninterrupted run's, and is the same in each
  attempt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from teachercache.errors import JobFailed, RecipeError, TeachercacheError
from teachercache.training.checkpoints import universal
from teachercache.training.checkpoints.completion import Checkpoint, whole_checkpoint

# How long processes wait for the main one to convert; the launcher ends them sooner if it dies.
LONGEST_CONVERSION = timedelta(days=1)


@contextmanager
def any_number_of_processes(trainer: Trainer, folder: str | None) -> Iterator[None]:
    """While it is open, `trainer` may resume from the checkpoint in `folder`, however many processes wrote it.

    All processes must open it. Raises, in all of them, `RecipeError` where DeepSpeed's settings keep a checkpoint
    from being converted, and `JobFailed` when it cannot be or comes out different.
    """
    checkpoint = whole_checkpoint(Path(folder)) if folder else None
    if checkpoint is None or checkpoint.world_size == trainer.args.world_size:
        yield
        return
    zero = _settings(trainer).get("zero_optimization", {}) if trainer.is_deepspeed_enabled else {}
    sharded = zero.get("stage", 0) > 0
    if sharded:
        _check_settings(zero, checkpoint)
        _in_main_process(trainer.args, lambda: universal.convert(checkpoint.folder))
        _load_universal(trainer, True)
    resumed = _Resumed(trainer, checkpoint, sharded=sharded)
    trainer.add_callback(resumed)
    try:
        with _groups_without_a_share() if sharded else nullcontext():
            yield
    finally:
        trainer.remove_callback(resumed)


def _check_settings(zero: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Refuse what DeepSpeed (0.19.8) would convert wrong, or not at all."""
    if zero.get("round_robin_gradients") and zero["stage"] < 3:  # and without an error
        raise RecipeError(
            f"{checkpoint.folder} was written by {checkpoint.world_size} process(es), and no other number can go on from "
            "it: round_robin_gradients shards it in another order than DeepSpeed's converter reads; resume with as many, or "
            "use another train.output"
        )


class _Resumed(TrainerCallback):
    """Does the rest of the work once DeepSpeed has loaded a conversion."""

    def __init__(self, trainer: Trainer, checkpoint: Checkpoint, *, sharded: bool) -> None:
        self._trainer, self._checkpoint, self._sharded = trainer, checkpoint, sharded
        self._reseeded = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: object
    ) -> None:
        if self._sharded:
            _load_universal(self._trainer, False)
            _mend_optimizer(optimizer, self._checkpoint)
            assert self._trainer.model is not None
            _check_weights(self._trainer.model, self._checkpoint)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if not self._reseeded:  # here: Trainer has loaded the states of other processes meanwhile
            set_seed(_seed(args.seed, step=self._checkpoint.step, rank=args.process_index))
            self._reseeded = True


def _seed(seed: int, *, step: int, rank: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=4).digest(), "little")


def _mend_optimizer(optimizer: Any, checkpoint: Checkpoint) -> None:
    """ZeRO 3 loads two things wrong (DeepSpeed 0.19.8, `load_hp_checkpoint_state_from_checkpoint_dir_stage3`): every
    group of parameters gets the settings of the first one, weight decay for norms and biases too; and all of them share
    one counter of steps, which each then advances, so that Adam's bias correction counts two or more for a step."""
    while hasattr(optimizer, "optimizer"):  # accelerate's wrapper, DeepSpeed's, then torch's own
        optimizer = optimizer.optimizer
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()
    path = checkpoint.folder / universal.UNIVERSAL / "zero" / "optimizer_state.pt"
    saved = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    groups = saved.get("optimizer_state_dict", saved)["param_groups"]
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        group.update({name: value for name, value in before.items() if name != "params"})


def _check_weights(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """The weights that arrived are those that the checkpoint holds for the export, bit by bit; under ZeRO 3, in which no
    process has whole ones, this says nothing. All processes find the same."""
    whole = {
        name.replace(".default.", "."): weights  # so does peft name the weights of adapters in files
        for name, weights in model.named_parameters()
        if not hasattr(weights, "ds_id")
    }
    for path in sorted(checkpoint.folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as stored:
            for name in sorted(set(stored.keys()) & whole.keys()):
                arrived = whole[name].detach().cpu()
                if torch.equal(arrived, stored.get_tensor(name).to(arrived.dtype)):
                    continue
                raise JobFailed(
                    f"{checkpoint.folder} was written by {checkpoint.world_size} process(es), and DeepSpeed restored "
                    f"other weights from it ({name}); resume with as many, or use another train.output"
                )


@contextmanager
def _groups_without_a_share() -> Iterator[None]:
    """Lets the last processes load all groups but those of which they have no share. Where processes are many and a
    group of parameters is small, they hold nothing but its padding, and DeepSpeed's ZeRO 1 and 2 end with an IndexError
    (0.19.8)."""
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

    load = ZeROOptimizer.load_hp_checkpoint_state_from_checkpoint_dir

    def load_shares(self: Any, groups_name: str, folder: str) -> None:
        groups, settings = getattr(self, groups_name), self.optimizer.param_groups
        shared = [any(parameter._hp_mapping is not None for parameter in group) for group in groups]
        setattr(self, groups_name, list(compress(groups, shared)))
        self.optimizer.param_groups = list(compress(settings, shared))
        try:
            load(self, groups_name, folder)
        finally:
            setattr(self, groups_name, groups)
            self.optimizer.param_groups = settings

    ZeROOptimizer.load_hp_checkpoint_state_from_checkpoint_dir = load_shares
    try:
        yield
    finally:
        ZeROOptimizer.load_hp_checkpoint_state_from_checkpoint_dir = load


def _settings(trainer: Trainer) -> dict[str, Any]:
    settings: dict[str, Any] = trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config
    return settings


def _load_universal(trainer: Trainer, wanted: bool) -> None:
    settings = _settings(trainer)
    section = {name: value for name, value in settings.pop("checkpoint", {}).items() if name != "load_universal"}
    if wanted:
        section["load_universal"] = True
    if section:
        settings["checkpoint"] = section
    engine = getattr(trainer, "deepspeed", None)
    if engine is not None:
        engine._config.load_universal_checkpoint = wanted


def _in_main_process(args: TrainingArguments, work: Any) -> None:
    """Run `work()` in the main process while the others wait, as long as it takes; its failure is everybody's."""
    group = None
    if args.world_size > 1:
        # A group of its own: the usual one gives up after minutes, and waits on the GPU.
        group = torch.distributed.new_group(backend="gloo", timeout=LONGEST_CONVERSION)
    failure: list[str | None] = [None]
    if args.process_index == 0:
        try:
            work()
        except TeachercacheError as error:
            failure = [str(error)]
    if group is not None:
        torch.distributed.broadcast_object_list(failure, src=0, group=group)
        torch.distributed.destroy_process_group(group)
    if failure[0] is not None:
        raise JobFailed(failure[0])
