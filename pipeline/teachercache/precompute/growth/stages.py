"""Further targets on Ray: a pool of teacher actors with one model each, to which Ray Data hands the shards."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ray

from teachercache.config import PrecomputeConfig, Recipe, TeacherConfig
from teachercache.errors import CacheError
from teachercache.precompute.capture.stages import RESTARTS, resources_of
from teachercache.precompute.engine.carried_errors import Row, carrying_errors, stopped
from teachercache.precompute.engine.placement import Placement
from teachercache.precompute.growth.further_targets import FurtherTargets

if TYPE_CHECKING:
    from teachercache.precompute.growth.further_shards import FurtherReport
    from teachercache.teacher import Teacher


@dataclass(frozen=True)
class FurtherJob:
    """Plan, settings and placement, as every stage needs them; travels to the workers."""

    plan: FurtherTargets
    teacher: TeacherConfig
    precompute: PrecomputeConfig
    placement: Placement

    @classmethod
    def of(cls, recipe: Recipe, plan: FurtherTargets, placement: Placement) -> FurtherJob:
        """The parts of a recipe that stages need, a local teacher by its absolute path: workers have a folder of their own."""
        assert recipe.teacher is not None
        model = Path(recipe.teacher.model).expanduser()
        place = {"model": str(model.resolve())} if model.exists() else {}
        return cls(plan, recipe.teacher.model_copy(update=place), recipe.precompute, placement)


class FurtherActor:
    """Ray Data's callable: one model."""

    def __init__(self, job: FurtherJob) -> None:
        self.job = job
        self._teacher: Teacher | None = None

    def __call__(self, row: Row) -> Row:
        return carrying_errors(self._capture, row, what=f"shard {row['unit']}")

    def _capture(self, row: Row) -> FurtherReport:
        from teachercache.precompute.growth.further_shards import capture_shard

        if self._teacher is None:  # here: what it raises is to be told as it is
            self._teacher = load_teacher(self.job)
        size = self.job.precompute.positions_per_batch
        return capture_shard(self._teacher, self.job.plan, int(row["unit"]), positions_per_batch=size)


def load_teacher(job: FurtherJob) -> Teacher:
    """The teacher with the layer files that are made by then. Raises `ModelError`, and `CacheError` where it is loaded in
    another precision than the cache's."""
    import torch

    from teachercache.precompute.capture.units import actor_threads
    from teachercache.teacher import Teacher

    torch.set_num_threads(actor_threads(job.precompute))
    plan = job.plan
    teacher = Teacher.load(
        job.teacher,
        targets=plan.loaded(),
        layout=plan.layout,
        pad_id=plan.pad_id,
        longest=plan.longest,
        device="cuda" if job.placement.gpus else "cpu",
    )
    if (dtype := teacher.describe()["dtype"]) != plan.dtype:
        raise CacheError(
            f"the teacher is loaded in {dtype}, that of {plan.store.name} was in {plan.dtype}; set teacher.dtype: {plan.dtype}"
        )
    return teacher


def run_preparation(job: FurtherJob) -> None:
    """Make the layer files, in a process with the resources of one actor. Raises what that raises."""
    task = ray.remote(**resources_of(job.placement), max_retries=1)(_prepare)
    try:
        row = ray.get(task.remote(job))
    except ray.exceptions.RayError as error:
        raise stopped(error) from error
    if row["problem"] is not None:
        raise pickle.loads(row["problem"])


def _prepare(job: FurtherJob) -> Row:
    from teachercache.precompute.growth.further_shards import make_layer_files

    def prepare(_: Row) -> None:
        make_layer_files(load_teacher(job), job.plan, positions_per_batch=job.precompute.positions_per_batch)

    return carrying_errors(prepare, {"unit": 0, "payload": b"", "problem": None}, what="reading the sample")


def run_shards(job: FurtherJob, pending: list[int]) -> Iterator[FurtherReport]:
    """Capture the further targets of these shards; yields a report as each one's files are in place."""
    rows: list[dict[str, Any]] = [{"unit": unit, "payload": b"", "problem": None} for unit in pending]
    units = ray.data.from_items(rows, override_num_blocks=len(pending))
    pool = ray.data.ActorPoolStrategy(size=min(job.placement.actors, len(pending)), max_tasks_in_flight_per_actor=2)
    # Ray's annotation of `map` has no room for a class.
    stage = units.map(
        cast(Any, FurtherActor),
        fn_constructor_args=(job,),
        compute=pool,
        max_restarts=RESTARTS,
        max_task_retries=-1,
        **resources_of(job.placement),
    )
    try:
        for row in stage.iter_rows():
            if row["problem"] is not None:
                raise pickle.loads(row["problem"])
            yield pickle.loads(row["payload"])
    except ray.exceptions.RayError as error:
        raise stopped(error) from error
