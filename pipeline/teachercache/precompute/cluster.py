"""Ray: units through the three stages, on one machine or a cluster.

Tokenising and writing are tasks, the teacher is a pool of actors with one model each. Ray Data streams units between them
with back-pressure. What flows is small next to the teacher's work; nothing is kept in Ray's store beyond a unit's way.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ray

import teachercache
from teachercache.config import CorpusConfig, PrecomputeConfig, Recipe, SequenceConfig, TeacherConfig
from teachercache.corpus.sequences import Tokenised
from teachercache.errors import JobFailed, TeachercacheError
from teachercache.precompute.plan import Plan
from teachercache.precompute.units import CapturedUnit, capture_unit, tokenise_unit, write_unit
from teachercache.teacher import Teacher

logger = logging.getLogger(__name__)

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


Row = dict[str, Any]


def _carrying_errors(stage: Callable[[Row], Any], row: Row) -> Row:
    """Run one stage on `{unit, payload, problem}`; an exception becomes the row's `problem` and passes by later stages.

    Ray Data would keep a failing stage's text but lose the exception itself, so that a user's mistake could not be told
    from a failure.
    """
    if row["problem"] is not None:
        return row
    try:
        return {"unit": row["unit"], "payload": pickle.dumps(stage(row)), "problem": None}
    except TeachercacheError as error:
        problem: TeachercacheError = error
    except Exception as error:
        logger.exception("unit %d", row["unit"])
        problem = JobFailed(f"unit {row['unit']}: {type(error).__name__}: {error}")
    return {"unit": row["unit"], "payload": b"", "problem": pickle.dumps(type(problem)(str(problem)))}


class TeacherActor:
    """Ray Data's callable of the teacher stage: one process, one model, loaded when the first unit comes."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.teacher: Teacher | None = None

    def __call__(self, row: Row) -> Row:
        return _carrying_errors(self._capture, row)

    def _capture(self, row: Row) -> tuple[CapturedUnit, dict[str, Any]]:
        if self.teacher is None:
            self.teacher = _load_teacher(self.job)
        tokenised, documents = pickle.loads(row["payload"])
        result = capture_unit(
            self.teacher, tokenised, documents, positions_per_batch=self.job.precompute.positions_per_batch
        )
        return result, self.teacher.describe()


def _load_teacher(job: Job) -> Teacher:
    import torch

    settings = job.precompute
    torch.set_num_threads(settings.threads_per_actor or max(1, (os.cpu_count() or 1) // settings.actors))
    device = "cuda" if settings.gpus_per_actor > 0 else "cpu"
    pad_id = job.plan.identity["tokenizer"]["pad_id"]
    return Teacher.load(job.teacher, kind=job.plan.kind, layout=job.sequence.layout, pad_id=pad_id, device=device)


def _tokenise(row: Row, job: Job) -> Row:
    def stage(row: Row) -> tuple[Tokenised, int]:
        return tokenise_unit(job.plan, int(row["unit"]), sequence=job.sequence, store_text=job.corpus.store_text)

    return _carrying_errors(stage, row)


def _write(row: Row, job: Job) -> Row:
    def stage(row: Row) -> Row:
        result, teacher = pickle.loads(row["payload"])
        record = write_unit(job.plan, int(row["unit"]), result, teacher=teacher)
        shard = record["shard"] or {}
        return {
            "positions": shard.get("positions", 0),
            "quarantined": record["quarantined_documents"],
            "teacher_started": result.started,
            "teacher_seconds": result.seconds,
        }

    return _carrying_errors(stage, row)


def run_units(job: Job, pending: list[int]) -> Iterator[dict[str, Any]]:
    """Run the pending units; yields a small summary as each one's shard is in place."""
    settings = job.precompute
    actors = min(settings.actors, len(pending))
    rows = [{"unit": unit, "payload": b"", "problem": None} for unit in pending]
    units = ray.data.from_items(rows, override_num_blocks=len(pending))
    # Ray's annotation of `map` has no room for a function with further arguments, or for a class.
    tokenise, capture, write = cast(Any, _tokenise), cast(Any, TeacherActor), cast(Any, _write)
    pool = ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2)
    gpus = settings.gpus_per_actor or None
    stages = (
        units.map(tokenise, fn_args=(job,), num_cpus=TASK_CPUS)
        .map(capture, fn_constructor_args=(job,), compute=pool, num_cpus=1, num_gpus=gpus)
        .map(write, fn_args=(job,), num_cpus=TASK_CPUS)
    )
    try:
        for row in stages.iter_rows():
            if row["problem"] is not None:
                raise pickle.loads(row["problem"])
            yield pickle.loads(row["payload"])
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise JobFailed(f"the job stopped: {lines[-1]}; run the same command again to go on") from error


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
        ray.init(
            address=address, runtime_env={"py_modules": [package]}, logging_level=logging.ERROR, log_to_driver=False
        )
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
