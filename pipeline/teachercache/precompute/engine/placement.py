"""Placement of the teacher: the number of actors, and whether each has a GPU. A function of the recipe and of the
cluster's nodes.

What the cluster cannot give is refused here: Ray would wait for it for ever.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from teachercache.config import PrecomputeConfig
from teachercache.errors import RecipeError

# Tasks beside the actors: a small share. Where every core belongs to an actor, the actors of a node give it up together:
# Ray reserves a little less for each, and their threads stay as many.
TASK_CPUS = 0.25


@dataclass(frozen=True)
class Node:
    """Resources of one machine of the cluster that Ray can give."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Placement:
    """The chosen placement. `gpus` and `cpus` are those of one actor; `unmet` says what was asked for, or is there, in
    vain."""

    actors: int
    gpus: float
    cpus: float
    threads: int | None
    unmet: str = ""

    def describe(self) -> str:
        """One line for people."""
        actors = f"{self.actors} actor{'s' if self.actors > 1 else ''}"
        if self.gpus:
            share = "a GPU" if self.gpus == 1 else f"{self.gpus:g} of a GPU"
            return f"teacher: {actors} with {share}{' each' if self.actors > 1 else ''}{self.unmet}"
        threads = "all cores" if self.threads is None else f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"teacher: {actors} on the CPU, {threads}{' each' if self.actors > 1 else ''}{self.unmet}"


def actor_cpus(settings: PrecomputeConfig) -> int:
    """CPUs of an actor: its threads, where they are set."""
    return settings.threads_per_actor or 1


def placed(settings: PrecomputeConfig, nodes: Sequence[Node], *, units: int) -> Placement:
    """Actors for a recipe on a cluster, never more than there are units to run.

    Under `auto`: one GPU an actor and as many actors as fit, or a single actor on the CPU where there is no GPU. Raises
    `RecipeError` for an actor that no node has room for.
    """
    most_gpus, cpus = max((node.gpus for node in nodes), default=0.0), actor_cpus(settings)
    gpus = float(most_gpus >= 1) if settings.gpus_per_actor == "auto" else settings.gpus_per_actor
    if gpus > most_gpus:
        raise RecipeError(_no_gpu(gpus, most_gpus))
    room = sum(_fitting(node, gpus, cpus) for node in nodes)
    if room < 1:
        raise RecipeError(_no_room(nodes, gpus, cpus))
    wanted = (room if gpus else 1) if settings.actors == "auto" else settings.actors
    unmet = _unmet(settings, nodes, wanted=wanted, room=room, gpus=gpus)
    return Placement(min(wanted, room, units), gpus, _reserved(nodes, gpus, cpus), settings.threads_per_actor, unmet)


def _reserved(nodes: Sequence[Node], gpus: float, cpus: int) -> float:
    """CPUs that Ray reserves for an actor: all of its own, if some node with every actor that it has room for has something
    left for tokenising."""
    fitting = [_fitting(node, gpus, cpus) for node in nodes]
    if any(node.cpus - count * cpus >= TASK_CPUS for node, count in zip(nodes, fitting, strict=True)):
        return cpus
    return math.floor(1000 * (cpus - TASK_CPUS / max(fitting))) / 1000  # down: Ray rounds to four digits


def _fitting(node: Node, gpus: float, cpus: int) -> int:
    by_cpus = int(node.cpus // cpus)
    return min(by_cpus, math.floor(node.gpus / gpus + 1e-9)) if gpus else by_cpus


def _no_gpu(gpus: float, most: float) -> str:
    there = f"no node of the cluster has more than {most:g}" if most else "the cluster has no GPU"
    return (
        f"precompute.gpus_per_actor: an actor is to have {gpus:g} of a GPU, and {there}; start a node that has one, or set "
        "gpus_per_actor: 0 to run on the CPU"
    )


def _no_room(nodes: Sequence[Node], gpus: float, cpus: int) -> str:
    most = max((node.cpus for node in nodes), default=0.0)
    beside = " and a GPU" if gpus else ""
    return (
        f"precompute.threads_per_actor: no node of the cluster has room for an actor with {cpus} CPUs{beside}: "
        f"the largest has {most:g} CPUs; lower it, or give Ray more CPUs"
    )


def _unmet(settings: PrecomputeConfig, nodes: Sequence[Node], *, wanted: int, room: int, gpus: float) -> str:
    """Words the part in brackets that is added to the line."""
    there = sum(node.gpus for node in nodes)
    if wanted > room:
        return f" (precompute.actors: {wanted}, but the cluster has room for {room})"
    if gpus and settings.actors == "auto" and room < math.floor(there / gpus + 1e-9):
        return f" (of {there:g} GPUs: CPUs for {actor_cpus(settings)} threads an actor are short)"
    if not gpus and there:
        return f" ({there:g} GPU{'s' if there != 1 else ''} of the cluster idle: precompute.gpus_per_actor is 0)"
    return "" if gpus else " (no GPU in the cluster)"
