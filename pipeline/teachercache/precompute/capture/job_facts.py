"""`Job`: facts that every stage of the capture job needs; travels to the workers, and to the teacher's process."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from pathlib import Path

from teachercache.config import CorpusConfig, PrecomputeConfig, Recipe, SequenceConfig, TeacherConfig
from teachercache.precompute.capture.plan import Plan
from teachercache.precompute.engine.placement import Placement


@dataclass(frozen=True)
class Job:
    """Plan, settings and placement; `run` names this run of the job."""

    plan: Plan
    teacher: TeacherConfig
    corpus: CorpusConfig
    sequence: SequenceConfig
    precompute: PrecomputeConfig
    placement: Placement
    run: str = field(default_factory=lambda: uuid.uuid4().hex)

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
        return cls(plan, teacher, recipe.corpus, recipe.sequence, recipe.precompute, placement)
