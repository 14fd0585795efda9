"""Layers that a recipe's `targets.hidden` and `targets.attention` ask for, of a given teacher: kinds with the numbers
filled in.

Everything that can be known from the teacher's config is checked here, before a model is loaded.
"""

from __future__ import annotations

from typing import Any

from teachercache.config import HIDDEN_STEPS, AttentionConfig, HiddenStatesConfig, LayerChoice, TargetsConfig
from teachercache.errors import RecipeError
from teachercache.targets import HiddenStates
from teachercache.targets.layers.attention_maps import AttentionMaps, check_length
from teachercache.targets.layers.attention_relations import QueriesKeys, Relations


def layer_kinds(targets: TargetsConfig, config: Any, *, longest: int) -> dict[str, Any]:
    """Kinds by section, for a teacher of this config and rows of at most `longest` tokens. Raises `RecipeError` for layers that
    it does not have, and for maps that are too large.

    Attention as `relations` is rebuilt from hidden states: those that it needs are stored even if nobody asked for them.
    """
    if targets.hidden is None and targets.attention is None:
        return {}
    text = config.get_text_config()
    attention = None if targets.attention is None else _attention(targets.attention, text, longest=longest)
    hidden = _hidden(targets.hidden, attention, text)
    return {name: kind for name, kind in (("hidden", hidden), ("attention", attention)) if kind is not None}


def _hidden(config: HiddenStatesConfig | None, attention: Any, text: Any) -> HiddenStates | None:
    needed = set() if attention is None else set(attention.hidden_layers)
    if config is None and not needed:
        return None
    chosen = config or HiddenStatesConfig(layers=tuple(sorted(needed)))
    layers = set(numbered("targets.hidden.layers", chosen.layers, count=_blocks(text), first=0)) | needed
    return HiddenStates(
        layers=tuple(sorted(layers)),
        width=_number(text, "hidden_size"),
        blocks=_blocks(text),
        codec=chosen.codec,
        step=HIDDEN_STEPS[chosen.codec] if chosen.step is None else chosen.step,
        calibration_positions=chosen.calibration_positions,
    )


def _attention(config: AttentionConfig, text: Any, *, longest: int) -> Relations | QueriesKeys | AttentionMaps:
    heads, width = _number(text, "num_attention_heads"), _number(text, "hidden_size")
    shared: dict[str, Any] = {
        "layers": numbered("targets.attention.layers", config.layers, count=_blocks(text), first=1),
        "heads": heads,
        "key_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_width": _head_width(text, width // heads),
        "width": width,
        "blocks": _blocks(text),
    }
    if config.kind == "maps":
        return _maps(config, shared, longest=longest)
    shared["values"] = config.values
    if config.kind == "relations":
        return Relations(**shared)
    return QueriesKeys(**shared, step=config.step, calibration_positions=config.calibration_positions)


def _maps(config: AttentionConfig, shared: dict[str, Any], *, longest: int) -> AttentionMaps:
    teacher_heads = shared["heads"]
    heads = teacher_heads if config.heads is None else config.heads
    if teacher_heads % heads:
        raise RecipeError(
            f"targets.attention.heads is {heads}, but the teacher's {teacher_heads} heads cannot be averaged in as many equal "
            "groups; choose a divisor, or leave it out: students of any head count mix heads themselves"
        )
    try:
        check_length(longest, heads=heads, layers=len(shared["layers"]), top=config.top)
    except ValueError as error:
        raise RecipeError(
            f"targets.attention: {error}; store fewer layers, fewer heads or the `top` keys of each query, make "
            "sequence.length smaller, or use kind: relations, which is linear in it"
        ) from None
    return AttentionMaps(**{**shared, "heads": heads, "teacher_heads": teacher_heads}, top=config.top, longest=longest)


def numbered(key: str, layers: tuple[int, ...] | LayerChoice, *, count: int, first: int) -> tuple[int, ...]:
    """Rising numbers of layers, of a model with `count` blocks whose layers are numbered from `first`. Raises `RecipeError`."""
    if isinstance(layers, LayerChoice):
        rule, number = next((name, value) for name, value in layers if value is not None)
        if number > count:
            raise RecipeError(f"{key}: {rule} is {number}, but the teacher has {count} blocks")
        chosen = {
            "every": lambda: range(number, count + 1, number),
            "first": lambda: range(1, number + 1),
            "last": lambda: range(count - number + 1, count + 1),
            "uniform": lambda: (_nearest(block * count, number) for block in range(1, number + 1)),
        }[rule]()
        return tuple(chosen)
    for layer in layers:
        if not first <= layer <= count:
            start = "0 (the embeddings)" if first == 0 else str(first)
            raise RecipeError(f"{key}: there is no layer {layer}; the teacher has layers {start} to {count}")
    if len(set(layers)) < len(layers):
        raise RecipeError(f"{key}: a layer is there twice")
    return tuple(sorted(layers))


def _nearest(numerator: int, denominator: int) -> int:
    """Rounded half up."""
    return (2 * numerator + denominator) // (2 * denominator)


def _head_width(text: Any, share: int) -> int:
    """Returns the width of queries and keys: those that have two parts, with and without positions (DeepSeek), are as
    wide as both."""
    parts = [getattr(text, name, 0) or 0 for name in ("qk_nope_head_dim", "qk_rope_head_dim")]
    return sum(parts) if all(parts) else getattr(text, "head_dim", None) or share


def _blocks(text: Any) -> int:
    return _number(text, "num_hidden_layers")


def _number(text: Any, name: str) -> int:
    value = getattr(text, name, None)
    if type(value) is not int:
        raise RecipeError(
            f"the teacher's config.json has no {name}, so its layers cannot be stored; leave targets.hidden and "
            "targets.attention out"
        )
    return value
