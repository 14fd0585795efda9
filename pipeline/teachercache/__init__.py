"""Knowledge distillation of language models from an offline cache of teacher outputs.

This is the public face: import from here. Names load what they need when they are first used, so that a reader of caches
meets neither torch nor ray.

    Cache, verify                      a finished cache, and its check
    load_recipe, parse_recipe, Recipe  a recipe from a file or a mapping
    ObjectiveConfig                    what a student minimises: a recipe's `objective:` section
    run_precompute, run_align          the jobs that write caches and alignments
    run_training, run_evaluation       the jobs that read them; run_sampling writes what a student says
    init_student                       a student from a model's own layers
    DistillationTrainer                `transformers.Trainer` on a cache
    TeachercacheError and its kinds    every error that is raised on purpose (errors.py)

The packages, in the order in which data flows: corpus/, tokens/, teacher/, targets/, precompute/, cache/, stream/, objective/,
training/, and evaluation/, sampling/ after it; config/ holds recipes, tasks/ what a row is asked, models/ what loads and asks
models, bounded/ what reads strangers' files.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from teachercache.errors import (
    CacheDamaged,
    CacheError,
    CorpusError,
    JobFailed,
    ModelError,
    RecipeError,
    TeachercacheError,
    UserError,
)
from teachercache.version import __version__

if TYPE_CHECKING:
    from teachercache.cache.reader import Cache
    from teachercache.cache.verify import verify
    from teachercache.config import ObjectiveConfig, Recipe, load_recipe, parse_recipe
    from teachercache.evaluation.recipe import run_evaluation
    from teachercache.precompute.align.job import run_align
    from teachercache.precompute.job import run_precompute
    from teachercache.sampling.job import run_sampling
    from teachercache.training.initialise.init_student import init_student
    from teachercache.training.job.train import run_training
    from teachercache.training.trainer.trainer import DistillationTrainer


_HOMES = {
    "Cache": "cache.reader",
    "DistillationTrainer": "training.trainer.trainer",
    "ObjectiveConfig": "config",
    "Recipe": "config",
    "init_student": "training.initialise.init_student",
    "load_recipe": "config",
    "parse_recipe": "config",
    "run_align": "precompute.align.job",
    "run_evaluation": "evaluation.recipe",
    "run_precompute": "precompute.job",
    "run_sampling": "sampling.job",
    "run_training": "training.job.train",
    "verify": "cache.verify",
}

__all__ = [
    "Cache",
    "CacheDamaged",
    "CacheError",
    "CorpusError",
    "DistillationTrainer",
    "JobFailed",
    "ModelError",
    "ObjectiveConfig",
    "Recipe",
    "RecipeError",
    "TeachercacheError",
    "UserError",
    "__version__",
    "init_student",
    "load_recipe",
    "parse_recipe",
    "run_align",
    "run_evaluation",
    "run_precompute",
    "run_sampling",
    "run_training",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Load a name of the face when it is first asked for (PEP 562)."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'teachercache' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"teachercache.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
