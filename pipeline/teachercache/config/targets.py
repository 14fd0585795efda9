"""The `targets:` section: what is stored of a teacher."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from teachercache.section import Section
from teachercache.targets.logits.kinds import DEFAULT, LogitsConfig


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

# Steps by codec, in units of a channel's spread; of projected in those of all channels (see targets/layers/hidden_states.py).
HIDDEN_STEPS = {"int8": 0.08, "projected": 0.6, "bf16": 0.0}


class HiddenStatesConfig(Section):
    """Hidden states of chosen layers."""

    layers: Layers = Field(description="numbers, or a rule: {every: 4}, {first: 8}, {last: 2}, {uniform: 6}")
    codec: Literal["int8", "projected", "bf16"] = Field(
        "int8",
        description="how channels are stored: int8 (quantised, 0.72 bytes a channel), projected (0.28), bf16 (1.42)",
    )
    step: float | None = Field(None, gt=0, le=1000, description="quantisation step; smaller = larger")
    calibration_positions: int = Field(
        4096, ge=64, description="tokens that give means, spreads and directions, drawn from the whole corpus"
    )

    @model_validator(mode="after")
    def _step_of_codes(self) -> HiddenStatesConfig:
        if self.codec == "bf16" and self.step is not None:
            raise ValueError("codec bf16 has no step; leave it out")
        return self


class AttentionConfig(Section):
    """Attention of chosen blocks, as what its maps are rebuilt from, or as maps."""

    kind: Literal["relations", "queries-keys", "maps"] = Field(
        "relations",
        description="from the hidden state that enters the block, or queries and keys; or maps, quadratic in a row's length",
    )
    layers: Layers = Field(description="numbers of blocks, from 1, or a rule as for hidden states")
    values: bool = Field(False, description="keep what relations among values need, too")
    step: float = Field(
        0.03, gt=0, le=1000, description="quantisation step of queries-keys, in units of a channel's spread"
    )
    calibration_positions: int = Field(4096, ge=64, description="tokens that give spreads, of queries-keys")
    top: int | None = Field(
        None, ge=1, le=1024, description="of maps: keys that are kept of each query; default: all of them"
    )
    heads: int | None = Field(
        None, ge=1, description="of maps: average groups of the teacher's heads, as many as the student's; default: all"
    )

    @model_validator(mode="after")
    def _of_this_kind(self) -> AttentionConfig:
        if self.kind == "maps" and self.values:
            raise ValueError("maps keep no values; leave `values` out, or use kind: relations")
        for name in ("top", "heads"):
            if self.kind != "maps" and getattr(self, name) is not None:
                raise ValueError(f"`{name}` is of kind: maps; {self.kind} keep every head and key")
        for name in ("step", "calibration_positions"):
            if self.kind != "queries-keys" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"`{name}` is of kind: queries-keys; {self.kind} have none of their own")
        return self


class TargetsConfig(Section):
    """Targets that are stored of the teacher."""

    logits: LogitsConfig = Field(
        default_factory=lambda: DEFAULT.config.model_validate({}),
        description="next-token distributions: one of the kinds below",
    )
    hidden: HiddenStatesConfig | None = Field(None, description="hidden states of chosen layers; default: none")
    attention: AttentionConfig | None = Field(None, description="attention of chosen blocks; default: none")
    boundary_mass: bool = Field(
        True,
        description="keep how probable it is that a new pre-token begins (about 1.1 bytes a position): students with other "
        "tokenizers learn from it",
    )
    calibration_from: str | None = Field(
        None,
        description="folder or URL of a finished cache with the same teacher, sequence and targets, whose basis and layer "
        "files are taken in place of new ones: shards of both may then stand in one cache (`merge`); default: calibrate",
    )
