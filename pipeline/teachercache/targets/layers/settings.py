"""Settings of layers in a recipe: which layers, by number or rule, and the sizes of the teacher that complete them.

All that can be known from the teacher's config is checked here, before a model is loaded.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from teachercache.errors import RecipeError
from teachercache.section import Section


class LayerChoice(Section):
    """Layers by a rule; of these exactly one. Hidden state 0 is the embeddings, layer i what block i gives."""

    every: int | None = Field(None, ge=1, description="layers n, 2n, 3n …")
    first: int | None = Field(None, ge=1, description="layers 1 to n")
    last: int | None = Field(None, ge=1, description="the n last ones")
    uniform: int | None = Field(None, ge=1, description="n evenly spaced ones, as a student of n blocks matches them")

    @model_validator(mode="after")
    def _one_rule(self) -> LayerChoice:
        if len(self.model_fields_set) != 1:
            raise ValueError("choose by one rule: every, first, last or uniform")
        return self


Layers = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | LayerChoice
BLOCKS = "numbers of blocks, from 1, or a rule as for hidden states"


class TeacherShape:
    """Sizes of a teacher, by its config (transformers'). Raises `RecipeError` for one that is asked for and not there."""

    def __init__(self, config: Any) -> None:
        self._text = config.get_text_config()

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self._number("num_hidden_layers")

    @property
    def width(self) -> int:
        """Channels of a hidden state."""
        return self._number("hidden_size")

    def hidden(self, layers: Layers) -> dict[str, Any]:
        """Returns the settings that every kind of hidden states has."""
        numbers = numbered("targets.hidden.layers", layers, count=self.blocks, first=0)
        return {"layers": numbers, "width": self.width, "blocks": self.blocks}

    def attention(self, layers: Layers) -> dict[str, Any]:
        """Returns the settings that every kind of attention has."""
        heads, width = self._number("num_attention_heads"), self.width
        return {
            "layers": numbered("targets.attention.layers", layers, count=self.blocks, first=1),
            "heads": heads,
            "key_heads": getattr(self._text, "num_key_value_heads", None) or heads,
            "head_width": self._head_width(width // heads),
            "width": width,
            "blocks": self.blocks,
        }

    def _head_width(self, share: int) -> int:
        """Returns the width of queries and keys: those that have two parts, with and without positions (DeepSeek), are as
        wide as both."""
        parts = [getattr(self._text, name, 0) or 0 for name in ("qk_nope_head_dim", "qk_rope_head_dim")]
        return sum(parts) if all(parts) else getattr(self._text, "head_dim", None) or share

    def _number(self, name: str) -> int:
        value = getattr(self._text, name, None)
        if type(value) is not int:
            raise RecipeError(
                f"the teacher's config.json has no {name}, so its layers cannot be stored; leave targets.hidden and "
                "targets.attention out"
            )
        return value


class LayerSettings(Section):
    """Base of a kind's settings as a recipe's `targets.hidden` or `targets.attention` holds them. A subclass has a key `kind`,
    a `Literal` of the kind's name, and `layers`."""

    def for_teacher(self, teacher: TeacherShape, *, longest: int) -> dict[str, Any]:
        """Returns the settings that `LayerKind.from_settings` takes, for a teacher and rows of at most `longest` tokens.
        Raises `RecipeError` for layers that the teacher does not have."""
        raise NotImplementedError


# Defaults that recipes of earlier versions wrote out whatever the kind was, when all kinds of attention shared their keys.
_EARLIER = {"values": False, "step": 0.03, "calibration_positions": 4096, "top": None, "heads": None}


class AttentionSettings(LayerSettings):
    """Base of the settings of the package's kinds of attention."""

    @model_validator(mode="before")
    @classmethod
    def _without_other_kinds_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        others = _EARLIER.keys() - cls.model_fields.keys()
        return {name: value for name, value in values.items() if name not in others or value != _EARLIER[name]}


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
        raise RecipeError(f"{key}: a layer is there twice; name it once")
    return tuple(sorted(layers))


def _nearest(numerator: int, denominator: int) -> int:
    """Rounded half up."""
    return (2 * numerator + denominator) // (2 * denominator)
