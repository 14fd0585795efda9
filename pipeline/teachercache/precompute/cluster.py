"""Ray: units through the three stages, on one machine or a cluster.

Tokenising and writing are tasks, the teacher is a pool of actors with one model each. Ray Data streams units between them
with back-pressure. What flows is small next to the teacher's work; nothing is kept in Ray's store beyond a unit's way.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

import teachercache
from teachercache.config import CorpusConfig, PrecomputeConfig, Recipe, SequenceConfig, TeacherConfig
from teachercache.errors import JobFailed, TeachercacheError
from teachercache.precompute.plan import Plan
from teachercache.precompute.units import capture_unit, tokenise_unit, write_unit
from teachercache.teacher import Teacher

# Tasks beside the actors: small shares, so that a machine whose cores all belong to actors still has room for them.
TASK_CPUS = 0.25


@dataclass(frozen=True)
class Job:
    """What every stage knows; travels to the workers."""

    plan: Plan
    teacher: TeacherConfig
    corpus: CorpusConfig
    sequence: SequenceConfig
    precompute: PrecomputeConfig

    @classmethod
    def of(cls, recipe: Recipe, plan: Plan) -> Job:
        """The parts of a recipe that stages need; the cache's path is made absolute, workers have their own folder."""
        assert recipe.teacher is not None and recipe.corpus is not None
        absolute = Plan(**{**vars(plan), "folder": plan.folder.resolve()})
        return cls(absolute, recipe.teacher, recipe.corpus, recipe.sequence, recipe.precompute)


class TeacherActor:
    """Ray Data's callable of the teacher stage: one process, one model."""

    def __init__(self, job: Job) -> None:
        import torch

        settings = job.precompute
        torch.set_num_threads(settings.threads_per_actor or max(1, (os.cpu_count() or 1) // settings.actors))
        layout, pad_id = job.sequence.layout, job.plan.identity["tokenizer"]["pad_id"]
        device = "cuda" if settings.gpus_per_actor > 0 else "cpu"
        self.job = job
        self.teacher = Teacher.load(job.teacher, kind=job.plan.kind, layout=layout, pad_id=pad_id, device=device)
        self.description = self.teacher.describe()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        tokenised, documents = pickle.loads(row["tokenised"])
        result = capture_unit(
            self.teacher, tokenised, documents, positions_per_batch=self.job.precompute.positions_per_batch
        )
        return {"unit": row["unit"], "captured": pickle.dumps((result, self.description))}


def _tokenise(row: dict[str, Any], job: Job) -> dict[str, Any]:
    unit = int(row["unit"])
    result = tokenise_unit(job.plan, unit, sequence=job.sequence, store_text=job.corpus.store_text)
    return {"unit": unit, "tokenised": pickle.dumps(result)}


def _write(row: dict[str, Any], job: Job) -> dict[str, Any]:
    result, teacher = pickle.loads(row["captured"])
    record = write_unit(job.plan, int(row["unit"]), result, teacher=teacher)
    shard = record["shard"] or {}
    return {
        "unit": row["unit"],
        "rows": shard.get("rows", 0),
        "positions": shard.get("positions", 0),
        "quarantined": record["quarantined_documents"],
        "teacher_started": result.started,
        "teacher_seconds": result.seconds,
    }


def run_units(job: Job, pending: list[int]) -> Iterator[dict[str, Any]]:
    """Run the pending units; yields a small summary as each one's shard is in place."""
    settings = job.precompute
    actors = min(settings.actors, len(pending))
    units = ray.data.from_items([{"unit": unit} for unit in pending], override_num_blocks=len(pending))
    stages = (
        units.map(_tokenise, fn_args=(job,), num_cpus=TASK_CPUS)
        .map(
            TeacherActor,
            fn_constructor_args=(job,),
            compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
            num_cpus=1,
            num_gpus=settings.gpus_per_actor or None,
        )
        .map(_write, fn_args=(job,), num_cpus=TASK_CPUS)
    )
    try:
        yield from stages.iter_rows()
    except ray.exceptions.RayError as error:
        raise _readable(error) from error


def _readable(error: BaseException) -> Exception:
    """The error that a stage raised on purpose, or one line about what went wrong in it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, TeachercacheError):
            return type(cause)(str(cause))
        inner = getattr(cause, "cause", None) or cause.__cause__
        if inner is None or inner is cause:
            break
        cause = inner
    text = str(cause).strip().splitlines()
    return JobFailed(f"the job stopped: {text[-1] if text else type(cause).__name__}; run the same command again to go on")


@contextmanager
def connected(settings: PrecomputeConfig) -> Iterator[None]:
    """A Ray cluster: the one that `address` or RAY_ADDRESS names, one already connected, or a local one for this job."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = settings.address or os.environ.get("RAY_ADDRESS")
    if address:
        package = str(Path(teachercache.__file__).parent)
        ray.init(address=address, runtime_env={"py_modules": [package]}, logging_level=logging.ERROR, log_to_driver=False)
    else:
        _start_local(settings)
    _quiet_ray_data()
    try:
        yield
    finally:
        ray.shutdown()


def _quiet_ray_data() -> None:
    """We show progress of our own; what Ray Data logs is in its session folder."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _start_local(settings: PrecomputeConfig) -> None:
    # Ray Data makes its C++ core report a restart caveat as an error at every start; real failures reach us as exceptions.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    source_root = str(Path(teachercache.__file__).parents[1])
    python_path = os.pathsep.join(filter(None, [source_root, os.environ.get("PYTHONPATH")]))
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, settings.actors + 1),
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": python_path}},
    )
