"""The capture job's stages on Ray.

Tokenising is a task; capturing and writing happen in a pool of teacher actors with one model each. Ray Data streams units from
the one to the other with back-pressure: token ids flow, targets never leave the actor that captured them.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ray

from teachercache.config import CorpusConfig, PrecomputeConfig, Recipe, SequenceConfig, TeacherConfig
from teachercache.corpus.sequences import Tokenised
from teachercache.errors import ModelError
from teachercache.precompute.capture.plan import Plan
from teachercache.precompute.capture.units import UnitReport, actor_threads, calibrate, compute_unit, tokenise_unit
from teachercache.precompute.engine.carried_errors import Row, carrying_errors, stopped
from teachercache.precompute.engine.placement import TASK_CPUS, Placement
from teachercache.teacher import Teacher

# A forward pass on a CPU frees buffers of many megabytes and asks for them again at once. Left to itself glibc (mallopt(3))
# maps and unmaps each of them, and the kernel clears its pages anew: 8 % of the time of
# SmolLM2-135M's pass (tests/bench/precompute_speed.py).
# One arena: Ray Data runs actors in threads, whose own arenas cannot grow enough.
KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(2**26),
}


@dataclass(frozen=True)
class Job:
    """Facts that every stage needs; travels to the workers."""

    plan: Plan
    teacher: TeacherConfig
    corpus: CorpusConfig
    sequence: SequenceConfig
    precompute: PrecomputeConfig
    placement: Placement

    @classmethod
    def of(cls, recipe: Recipe, plan: Plan, placement: Placement) -> Job:
        """The parts of a recipe that stages need, with paths made absolute: workers have a folder of their own.

        Actors load the very commit that was planned with, also when the hub's newest one changes meanwhile.
        """
        assert recipe.teacher is not None and recipe.corpus is not None
        teacher = recipe.teacher
        if Path(teacher.model).expanduser().exists():
            teacher = teacher.model_copy(update={"model": str(Path(teacher.model).expanduser().resolve())})
        commit = plan.identity["teacher"].get("commit")
        teacher = teacher.model_copy(update={"revision": commit or teacher.revision})
        absolute = dataclasses.replace(plan, folder=plan.folder.resolve())
        return cls(absolute, teacher, recipe.corpus, recipe.sequence, recipe.precompute, placement)


class TeacherActor:
    """Ray Data's callable of the teacher stage: one process, one model, loaded when the first unit comes."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.teacher: Teacher | None = None

    def __call__(self, row: Row) -> Row:
        return carrying_errors(self._compute, row)

    def _compute(self, row: Row) -> UnitReport:
        if self.teacher is None:
            self.teacher = _load_teacher(self.job)
        tokenised, documents = pickle.loads(row["payload"])
        size = self.job.precompute.positions_per_batch
        return compute_unit(
            self.teacher, self.job.plan, int(row["unit"]), tokenised, documents=documents, positions_per_batch=size
        )


def _load_teacher(job: Job) -> Teacher:
    import torch

    torch.set_num_threads(actor_threads(job.precompute))
    device = "cuda" if job.placement.gpus else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            f"the actor on {os.uname().nodename} has a GPU, which its torch {torch.__version__} cannot use; install a build of "
            "torch for this GPU, or set precompute.gpus_per_actor: 0 to run on the CPU"
        )
    pad_id = job.plan.identity["tokenizer"]["pad_id"]
    return Teacher.load(
        job.teacher,
        targets=job.plan.loaded_targets(),
        layout=job.sequence.layout,
        pad_id=pad_id,
        longest=job.sequence.length,
        device=device,
    )


def run_calibration(job: Job) -> None:
    """Fit the sketch and make the layer files, in a process with the resources of one actor. Raises what the teacher raises."""
    task = ray.remote(**resources_of(job.placement), max_retries=1)(_calibrate)
    try:
        row = ray.get(task.remote(job))
    except ray.exceptions.RayError as error:
        raise stopped(error) from error
    if row["problem"] is not None:
        raise pickle.loads(row["problem"])


def _calibrate(job: Job) -> Row:
    def stage(row: Row) -> None:
        calibrate(
            _load_teacher(job),
            job.plan,
            sequence=job.sequence,
            positions_per_batch=job.precompute.positions_per_batch,
        )

    return carrying_errors(stage, {"unit": 0, "payload": b"", "problem": None}, what="calibrating")


def _tokenise(row: Row, job: Job) -> Row:
    def stage(row: Row) -> tuple[Tokenised, int]:
        return tokenise_unit(job.plan, int(row["unit"]), sequence=job.sequence, store_text=job.corpus.store_text)

    return carrying_errors(stage, row)


def resources_of(placement: Placement) -> dict[str, Any]:
    """Returns the resources that Ray gives to the process that holds a teacher."""
    if placement.gpus:
        return {"num_cpus": placement.cpus, "num_gpus": placement.gpus}
    return {"num_cpus": placement.cpus, "runtime_env": {"env_vars": KEEP_FREED_MEMORY}}


def run_units(job: Job, pending: list[int]) -> Iterator[UnitReport]:
    """Run the pending units; yields a report as each one's shard is in place."""
    rows = [{"unit": unit, "payload": b"", "problem": None} for unit in pending]
    units = ray.data.from_items(rows, override_num_blocks=len(pending))
    # Ray's annotation of `map` has no room for a function with further arguments, or for a class.
    tokenise, compute = cast(Any, _tokenise), cast(Any, TeacherActor)
    pool = ray.data.ActorPoolStrategy(size=min(job.placement.actors, len(pending)), max_tasks_in_flight_per_actor=2)
    stages = units.map(tokenise, fn_args=(job,), num_cpus=TASK_CPUS).map(
        compute, fn_constructor_args=(job,), compute=pool, **resources_of(job.placement)
    )
    try:
        for row in stages.iter_rows():
            if row["problem"] is not None:
                raise pickle.loads(row["problem"])
            yield pickle.loads(row["payload"])
    except ray.exceptions.RayError as error:
        raise stopped(error) from error
