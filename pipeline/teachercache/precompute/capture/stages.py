"""The capture job's stages on Ray.

Tokenising is a task; capturing and writing happen in a pool of teacher actors with one model each, which lives in a process
beside its actor (supervisor.py). Ray Data streams units from the one to the other with back-pressure: token ids flow, targets
never leave the process that captured them.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import ray

from teachercache.errors import JobFailed
from teachercache.precompute.capture.attempts import marked
from teachercache.precompute.capture.job_facts import Job
from teachercache.precompute.capture.supervisor import GivenUp, Supervisor
from teachercache.precompute.engine.carried_errors import Row, carrying_errors, stopped
from teachercache.precompute.engine.metrics import ActorMetrics
from teachercache.precompute.engine.placement import TASK_CPUS, Placement
from teachercache.precompute.engine.unit_source import units_dataset
from teachercache.stage_times import measured

if TYPE_CHECKING:
    from teachercache.corpus.sequences import Tokenised
    from teachercache.precompute.capture.units import UnitReport

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


# Times that Ray starts an actor again, by default without end. A unit has a bound of its own (supervisor.py): this one is for
# actors that die before they take any.
RESTARTS = 16


TOKENISING = 2  # tasks for each actor, at most


class TeacherActor:
    """Ray Data's callable of the teacher stage: one supervisor, whose process holds one model."""

    def __init__(self, job: Job) -> None:
        self.supervisor = Supervisor(job)
        self._metrics = ActorMetrics(job.plan.store.name)

    def __call__(self, row: Row) -> Row:
        return {**carrying_errors(self._compute, row), "seconds": row["seconds"]}

    def _compute(self, row: Row) -> UnitReport | GivenUp:
        done: UnitReport | GivenUp = self.supervisor.compute(int(row["unit"]), row["payload"])
        if not isinstance(done, GivenUp):
            self._metrics.add(rows=done.rows, positions=done.positions, size=done.bytes)
        return done


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
    row = {"unit": 0, "payload": b"", "problem": None}
    return carrying_errors(lambda _: Supervisor(job).calibrate(), row, what="calibrating")


def _tokenise(row: Row, job: Job) -> Row:
    """The unit's tokens; no payload where that fails or an earlier task died of it: the teacher's process tries it then."""
    from teachercache.precompute.capture.unit_tokens import tokenise_unit

    def stage(row: Row) -> tuple[Tokenised, int]:
        return tokenise_unit(job.plan, int(row["unit"]), sequence=job.sequence, store_text=job.corpus.store_text)

    with marked(job.plan.store, int(row["unit"])) as is_first, measured() as seconds:
        done = carrying_errors(stage, row) if is_first else row
    done = {**row, "payload": b""} if isinstance(_problem(done), JobFailed) else done
    return {**done, "seconds": pickle.dumps(dict(seconds))}


def _problem(row: Row) -> Exception | None:
    problem = row["problem"]
    return None if problem is None else pickle.loads(problem)


def resources_of(placement: Placement) -> dict[str, Any]:
    """Returns the resources that Ray gives to the process that holds a teacher."""
    if placement.gpus:
        return {"num_cpus": placement.cpus, "num_gpus": placement.gpus}
    return {"num_cpus": placement.cpus, "runtime_env": {"env_vars": KEEP_FREED_MEMORY}}


def run_units(job: Job, pending: list[int]) -> Iterator[tuple[UnitReport | GivenUp, dict[str, float]]]:
    """Run the pending units; yields a report as each one's shard is in place, or the reason why there is none, with the seconds
    that its documents were read and tokenised for."""
    actors = min(job.placement.actors, len(pending))
    ahead = min(len(pending), TOKENISING * actors + 1)  # each is a process that imports what it needs
    units = units_dataset(pending, cpus=TASK_CPUS, tasks=ahead)
    # Ray's annotation of `map` has no room for a function with further arguments, or for a class.
    tokenise, compute = cast(Any, _tokenise), cast(Any, TeacherActor)
    pool = ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2)
    tasks = ray.data.TaskPoolStrategy(size=ahead)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Ray 2.60, which has no other way to bound restarts
        stages = units.map(tokenise, fn_args=(job,), compute=tasks, num_cpus=TASK_CPUS).map(
            compute,
            fn_constructor_args=(job,),
            compute=pool,
            max_restarts=RESTARTS,
            max_task_retries=-1,
            **resources_of(job.placement),
        )
    try:
        for row in stages.iter_rows():
            if row["problem"] is not None:
                raise pickle.loads(row["problem"])
            yield pickle.loads(row["payload"]), pickle.loads(row["seconds"])
    except ray.exceptions.RayActorError as error:
        raise JobFailed(
            f"the job stopped: an actor died {RESTARTS + 1} times, or with its node; what it said last is in Ray's logs on its "
            "node (/tmp/ray/session_latest/logs); finished units are kept: run the same command again to go on"
        ) from error
    except ray.exceptions.RayError as error:
        raise stopped(error) from error
