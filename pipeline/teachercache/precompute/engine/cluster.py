"""Ray: a cluster to join or to start, and tasks on all of its cores."""

from __future__ import annotations

import logging
import os
import pickle
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import ray

from teachercache.config import PrecomputeConfig
from teachercache.files import SOURCES
from teachercache.precompute.engine.carried_errors import Row, carrying_errors, stopped
from teachercache.precompute.engine.local_ray import local_cluster
from teachercache.precompute.engine.placement import Node, actor_cpus
from teachercache.precompute.engine.termination import kept_handler
from teachercache.precompute.engine.unit_source import units_dataset

Item = TypeVar("Item")
Result = TypeVar("Result")

WAITING_TASKS = 4  # for each CPU: their results are taken in order


def run_tasks(work: Callable[[Any, int], Any], plan: Any, pending: list[int], *, what: str) -> Iterator[Any]:
    """`work(plan, unit)` of all pending units, on as many cores as there are; yields what each gives, as it is done.

    Raises what the work raises: a `TeachercacheError` as it is, anything else as `JobFailed`, naming `what` a unit is.
    """
    units = units_dataset(pending, cpus=1)
    try:
        for row in units.map(cast(Any, _task), fn_args=(work, plan, what), num_cpus=1).iter_rows():
            if row["problem"] is not None:
                raise pickle.loads(row["problem"])
            yield pickle.loads(row["payload"])
    except ray.exceptions.RayError as error:
        raise stopped(error) from error


def on_cluster(work: Callable[[Item], Result], items: Sequence[Item], /) -> Iterator[Result]:
    """`Each` (planning/each.py) as tasks of the cluster that is connected, as many at a time as it has room for.

    Raises what the work raises: a `TeachercacheError` as it is, anything else as `JobFailed`.
    """
    task, waiting = ray.remote(num_cpus=1)(_done), deque[Any]()
    most = WAITING_TASKS * max(1, int(ray.cluster_resources().get("CPU", 1)))
    try:
        for item in items:
            if len(waiting) >= most:
                yield _result(ray.get(waiting.popleft()))
            waiting.append(task.remote(work, item))
        while waiting:
            yield _result(ray.get(waiting.popleft()))
    except ray.exceptions.RayError as error:
        raise stopped(error) from error


def _done(work: Callable[[Any], Any], item: Any) -> Row:
    row = {"unit": 0, "payload": b"", "problem": None}
    return carrying_errors(lambda _: work(item), row, what="reading the corpus")


def _result(row: Row) -> Any:
    if row["problem"] is not None:
        raise pickle.loads(row["problem"])
    return pickle.loads(row["payload"])


def _task(row: Row, work: Callable[[Any, int], Any], plan: Any, what: str) -> Row:
    unit = int(row["unit"])
    return carrying_errors(lambda _: work(plan, unit), row, what=f"{what} {unit}")


@contextmanager
def connected(settings: PrecomputeConfig) -> Iterator[None]:
    """A Ray cluster: the one that `address` or RAY_ADDRESS names, with the authentication that it has, one already connected,
    or a local one for this job."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = settings.address or os.environ.get("RAY_ADDRESS")
    with _cluster_at(address) if address else local_cluster(cpus=_local_cpus(settings)):
        _quiet_ray_data()
        yield


@contextmanager
def _cluster_at(address: str) -> Iterator[None]:
    package = str(SOURCES / "teachercache")
    with kept_handler():
        ray.init(
            address=address, runtime_env={"py_modules": [package]}, logging_level=logging.ERROR, log_to_driver=False
        )
    try:
        yield
    finally:
        ray.shutdown()


def _local_cpus(settings: PrecomputeConfig) -> int:
    """CPUs of a local cluster: this machine's, or as many as the actors and the tasks beside them are to have. With `auto` the
    actors may take all of the machine's."""
    cpus = os.cpu_count() or 1
    if settings.actors == "auto":
        return max(cpus, actor_cpus(settings)) + 1
    return max(cpus, settings.actors * actor_cpus(settings) + 1)


def _quiet_ray_data() -> None:
    """We show progress of our own; what Ray Data logs is in its session folder."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def cluster_nodes() -> list[Node]:
    """The machines of the cluster that is connected."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in resources]
