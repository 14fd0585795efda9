"""Layers that a recipe's `targets.hidden` and `targets.attention` ask for, of a given teacher: kinds with the numbers
filled in."""

from __future__ import annotations

from typing import Any, cast

from teachercache.config import TargetsConfig
from teachercache.targets.layers.hidden_states import HiddenStatesConfig
from teachercache.targets.layers.kind import AttentionKind, HiddenKind, LayerKind
from teachercache.targets.layers.kinds import layer_kind
from teachercache.targets.layers.settings import LayerSettings, TeacherShape


def layer_kinds(targets: TargetsConfig, config: Any, *, longest: int) -> dict[str, Any]:
    """Kinds by section, for a teacher of this config and rows of at most `longest` tokens. Raises `RecipeError` for layers that
    it does not have, and for what is too large.

    Attention may be rebuilt from hidden states: those that it needs are stored even if nobody asked for them.
    """
    if targets.hidden is None and targets.attention is None:
        return {}
    teacher, kinds = TeacherShape(config), dict[str, LayerKind]()
    needed: set[int] = set()
    if targets.attention is not None:
        settings = _settings(targets.attention, teacher, longest)
        kinds["attention"] = attention = cast(AttentionKind, layer_kind("attention", settings))
        needed = set(attention.hidden_layers) if attention.from_hidden else set()
    if targets.hidden is not None or needed:
        hidden = targets.hidden or HiddenStatesConfig(layers=tuple(sorted(needed)))
        settings = _settings(hidden, teacher, longest)
        settings["layers"] = tuple(sorted({*settings["layers"], *needed}))
        kinds["hidden"] = cast(HiddenKind, layer_kind("hidden", settings))
    return kinds


def _settings(config: LayerSettings, teacher: TeacherShape, longest: int) -> dict[str, Any]:
    kind: str = config.kind  # type: ignore[attr-defined]  # every subclass has one
    return {"kind": kind, **config.for_teacher(teacher, longest=longest)}
