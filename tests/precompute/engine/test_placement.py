"""Placement of a teacher, chosen from what a cluster has."""

from __future__ import annotations

from typing import Any

import pytest

from teachercache.config import PrecomputeConfig
from teachercache.config.recipe import parse_recipe
from teachercache.errors import RecipeError, UserError
from teachercache.precompute.engine.placement import TASK_CPUS, Node, placed

LAPTOP, TWO_GPUS, WORKER = Node(2, 0), Node(16, 2), Node(64, 8)


def chosen(*nodes: Node, units: int = 100, **settings: Any) -> str:
    return placed(PrecomputeConfig(**settings), nodes, units=units).describe()


@pytest.mark.parametrize(
    ("nodes", "settings", "line"),
    [
        ([LAPTOP], {}, "teacher: 1 actor on the CPU, all cores (no GPU in the cluster)"),
        ([LAPTOP], {"threads_per_actor": 1}, "teacher: 1 actor on the CPU, 1 thread (no GPU in the cluster)"),
        ([WORKER, LAPTOP], {"gpus_per_actor": 0, "actors": 3, "threads_per_actor": 2},
         "teacher: 3 actors on the CPU, 2 threads each (8 GPUs of the cluster idle: precompute.gpus_per_actor is 0)"),
        ([Node(4, 1)], {}, "teacher: 1 actor with a GPU"),
        ([TWO_GPUS], {}, "teacher: 2 actors with a GPU each"),
        ([LAPTOP, TWO_GPUS, WORKER], {}, "teacher: 10 actors with a GPU each"),
        ([TWO_GPUS], {"gpus_per_actor": 0.25}, "teacher: 8 actors with 0.25 of a GPU each"),
        ([WORKER], {"actors": 3}, "teacher: 3 actors with a GPU each"),
        ([TWO_GPUS], {"actors": 4},
         "teacher: 2 actors with a GPU each (precompute.actors: 4, but the cluster has room for 2)"),
        ([WORKER], {"threads_per_actor": 20},
         "teacher: 3 actors with a GPU each (of 8 GPUs: CPUs for 20 threads an actor are short)"),
    ],
)  # fmt: skip
def test_what_is_chosen_is_said(nodes: list[Node], settings: dict[str, Any], line: str) -> None:
    assert chosen(*nodes, **settings) == line


def test_there_are_no_more_actors_than_units() -> None:
    assert chosen(WORKER, units=3) == "teacher: 3 actors with a GPU each"


@pytest.mark.parametrize(
    ("nodes", "settings", "actors"),
    [
        ([Node(8, 8)], {}, 8),
        ([Node(1, 1)], {}, 1),
        ([Node(1, 0)], {}, 1),
        ([Node(4, 0)], {"actors": 4}, 4),
        ([Node(4, 0)], {"threads_per_actor": 4}, 1),
        ([Node(8, 2), Node(4, 1)], {"threads_per_actor": 4}, 3),
        ([Node(3, 8), Node(1, 8)], {}, 4),
        ([Node(4.1, 4), Node(4.2, 4)], {}, 8),
    ],
)
def test_where_every_cpu_belongs_to_an_actor_all_of_them_run_and_leave_enough_to_tokenise(
    nodes: list[Node], settings: dict[str, Any], actors: int
) -> None:
    found = placed(PrecomputeConfig(**settings), nodes, units=100)
    assert found.actors == actors
    threads = settings.get("threads_per_actor", 1)
    left = [node.cpus - round(found.cpus, 4) * (node.cpus // threads) for node in nodes]
    assert max(left) >= TASK_CPUS
    assert all(spare < found.cpus for spare in left)  # no room for one more actor than cores


def test_an_actor_has_its_cpus_whole_where_some_are_left() -> None:
    assert placed(PrecomputeConfig(), [Node(8, 8), Node(9, 8)], units=100).cpus == 1
    assert placed(PrecomputeConfig(threads_per_actor=3), [Node(8, 8)], units=100).cpus == 3


@pytest.mark.parametrize(
    ("nodes", "settings", "told"),
    [
        ([LAPTOP], {"gpus_per_actor": 1}, "the cluster has no GPU; start a node that has one, or set gpus_per_actor: 0"),
        ([LAPTOP], {"gpus_per_actor": 0.5}, "an actor is to have 0.5 of a GPU, and the cluster has no GPU"),
        ([Node(8, 0.5), Node(8, 0.5)], {"gpus_per_actor": 1}, "no node of the cluster has more than 0.5"),
        ([LAPTOP, LAPTOP], {"threads_per_actor": 4}, "no node of the cluster has room for an actor with 4 CPUs"),
        ([Node(0.5, 1)], {}, "no node of the cluster has room for an actor with 1 CPUs and a GPU: the largest has 0.5"),
        ([], {}, "no node of the cluster has room"),
    ],
)  # fmt: skip
def test_what_would_wait_for_ever_is_refused(nodes: list[Node], settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told) as refused:
        chosen(*nodes, **settings)
    assert "\n" not in str(refused.value) and refused.value.exit_status == 2


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("gpus_per_actor", 2, "a teacher runs on one GPU"),
        ("gpus_per_actor", -1, "must be from 0 to 1"),
        ("gpus_per_actor", "all", "must be a number, or auto"),
        ("actors", 0, "must be 1 or more, or auto"),
        ("actors", 1.5, "must be a whole number, or auto"),
        ("actors", True, "must be a whole number, or auto"),
    ],
)
def test_a_recipe_that_asks_for_something_else_is_refused_in_a_line(key: str, value: Any, told: str) -> None:
    with pytest.raises(RecipeError, match=told) as refused:
        parse_recipe({"cache": "c", "precompute": {key: value}}, origin="r.yaml")
    assert str(refused.value).startswith(f"recipe r.yaml: `precompute.{key}`: must") and "\n" not in str(refused.value)
