"""Recipes: one YAML file describes a precompute job, a training job, or both.

Sections and who reads them:

    cache                                        the folder that one job writes and the other reads, there or at a URL
    teacher, corpus, sequence, targets, precompute     `teachercache precompute`
    student, objective, teachers, stream, train, phases    `teachercache train`

    recipe.py      `Recipe`: all sections; YAML and overrides
    location.py    where a cache is: a folder or a URL
    precompute.py  teacher, corpus, sequence, precompute
    targets.py     what is stored of a teacher
    training.py    student, stream, train
    objective.py   what a student minimises
    layer_losses.py    the list of losses between layers
    emphasis.py    weights of hard positions
    routing.py     which parts of a student learn from which terms
    teachers.py    several teachers
    phases.py      runs in phases

Paths in a recipe are relative to the working directory. Configs are frozen; unknown keys are refused with the nearest
valid one; `key.path=value` overrides come from the command line. A cache describes itself: a training recipe never
repeats what was captured.
"""

from __future__ import annotations

from teachercache.config.emphasis import EmphasisConfig
from teachercache.config.location import CacheLocation, is_url
from teachercache.config.objective import AcrossTermConfig, LayerTermConfig, ObjectiveConfig
from teachercache.config.phases import PhaseConfig
from teachercache.config.precompute import CorpusConfig, PrecomputeConfig, RowPrefix, SequenceConfig, TeacherConfig
from teachercache.config.recipe import Recipe, load_recipe, parse_recipe
from teachercache.config.routing import RoutingConfig
from teachercache.config.targets import TargetsConfig
from teachercache.config.teachers import FurtherTeacherConfig, TeachersConfig
from teachercache.config.training import (
    LOCAL_COPIES,
    LOCAL_COPIES_BYTES,
    LoraConfig,
    MixConfig,
    StreamConfig,
    StudentConfig,
    TrainConfig,
)
from teachercache.section import Section
from teachercache.targets.logits.head_sketch import HeadSketchConfig
from teachercache.targets.logits.kinds import LogitsConfig

__all__ = [
    "LOCAL_COPIES",
    "LOCAL_COPIES_BYTES",
    "AcrossTermConfig",
    "CacheLocation",
    "CorpusConfig",
    "EmphasisConfig",
    "FurtherTeacherConfig",
    "HeadSketchConfig",
    "LayerTermConfig",
    "LogitsConfig",
    "LoraConfig",
    "MixConfig",
    "ObjectiveConfig",
    "PhaseConfig",
    "PrecomputeConfig",
    "Recipe",
    "RoutingConfig",
    "RowPrefix",
    "Section",
    "SequenceConfig",
    "StreamConfig",
    "StudentConfig",
    "TargetsConfig",
    "TeacherConfig",
    "TeachersConfig",
    "TrainConfig",
    "is_url",
    "load_recipe",
    "parse_recipe",
]
