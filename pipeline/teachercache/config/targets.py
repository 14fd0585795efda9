"""What is stored of a teacher."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from teachercache.config.section import Section


class GridConfig(Section):
    """Base of kinds that hold the tail log-partition on a temperature grid."""

    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1.0, 2.0, 4.0, 8.0), description="where the mass outside the head is stored; students train at these"
    )
    dtype: Literal["float16", "float32"] = Field("float16", description="of the stored logits and masses")

    @model_validator(mode="after")
    def _ordered_grid(self) -> GridConfig:
        if not self.temperatures or list(self.temperatures) != sorted(set(self.temperatures)):
            raise ValueError("temperatures must rise, each once, and hold at least one: [1, 2, 4, 8]")
        if 1.0 not in self.temperatures:
            raise ValueError("temperatures must hold 1: the log-probability of the actual token is taken there")
        return self


class TopKConfig(GridConfig):
    """Top-k logits with the exact tail log-partition on a temperature grid."""

    kind: Literal["top-k"] = Field("top-k", description="the k largest logits")
    k: int = Field(64, ge=1, description="largest logits kept exactly")


class TopPConfig(GridConfig):
    """As many of the largest logits as hold a share p of the mass, and the exact tail log-partition outside them."""

    kind: Literal["top-p"] = Field("top-p", description="as many of the largest logits as hold a share p")
    p: float = Field(0.95, gt=0, le=1, description="mass of a head at T = 1")
    k: int = Field(64, ge=1, description="most tokens of a head, whatever its mass")


class RandomSamplingConfig(Section):
    """Tokens drawn from the teacher with replacement, and how often each came up."""

    kind: Literal["random-sampling"] = Field("random-sampling", description="tokens drawn from the teacher")
    draws: int = Field(
        50, ge=1, le=2**16 - 1, description="draws at each position; about 12 to 16 different tokens of 50"
    )
    draw_temperature: float = Field(1.0, gt=0, description="where the sample is unbiased: train at this temperature")


class FullConfig(Section):
    """Every log-probability, for vocabularies of at most 4096 tokens or classes."""

    kind: Literal["full"] = Field("full", description="every log-probability")
    dtype: Literal["float16", "float32"] = Field("float16", description="of the stored log-probabilities")


class HiddenConfig(Section):
    """The final hidden state, quantised, and the teacher's output matrix once a cache."""

    kind: Literal["hidden"] = Field("hidden", description="the final hidden state")
    width: int | None = Field(None, ge=1, description="inputs of the teacher's output layer; default: its hidden_size")
    step: float = Field(
        1 / 32, gt=0, le=1000, description="quantisation step in units of a channel's spread; smaller = larger"
    )
    calibration_positions: int = Field(
        4096, ge=64, description="positions that give means and spreads, drawn from the whole corpus by content hash"
    )


SKETCH_PRESETS: dict[str, dict[str, Any]] = {
    # 59 and 109 bytes a position of SmolLM2-135M (tests/bench/codec_fidelity.py)
    "compact": {"k": 10, "rank": 320, "step": 0.16},
    "fine": {"k": 20, "rank": 384, "step": 0.1},
}


class HeadSketchConfig(Section):
    """The largest logits exactly, the tail's mass at every temperature, and a low-rank sketch of the tail's shape."""

    kind: Literal["head+sketch"] = Field(
        "head+sketch", description="an exact head and a sketch of the tail: the default"
    )
    preset: Literal["compact", "fine"] = Field("compact", description="sets k, rank and step where they are not given")
    k: int = Field(0, ge=1, validate_default=False, description="largest logits kept exactly")
    rank: int | None = Field(
        0, ge=1, validate_default=False, description="directions of the sketch; a narrower model takes its width"
    )
    step: float | None = Field(
        0.0, gt=0, le=1000, validate_default=False, description="quantisation step in logits; smaller = larger"
    )
    target_kl: float | None = Field(
        None,
        gt=0,
        description="instead of the preset's rank and step: the pair of fewest bytes whose KL(teacher ‖ stored), in nats, is "
        "at most this at T = 1 and 2; a rank or step that is given beside it stays",
    )
    calibration_positions: int = Field(
        16384, ge=64, description="positions that the sketch is fitted to, drawn from the whole corpus by content hash"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset = SKETCH_PRESETS.get(values.get("preset", "compact"), {})
        if values.get("target_kl") is not None:
            preset = {**preset, "rank": None, "step": None}
        return {**preset, **values}

    @model_validator(mode="after")
    def _rank_and_step(self) -> HeadSketchConfig:
        if self.target_kl is None and (self.rank is None or self.step is None):
            raise ValueError("rank and step need values, or a target_kl by which calibration chooses them")
        return self


def _kind_of(values: Any) -> str:
    kind = values.get("kind", "head+sketch") if isinstance(values, dict) else getattr(values, "kind", "head+sketch")
    return str(kind)


# Another kind of logit target joins here and in `teachercache.targets.KINDS`.
LogitsConfig = Annotated[
    Annotated[HeadSketchConfig, Tag("head+sketch")]
    | Annotated[TopKConfig, Tag("top-k")]
    | Annotated[TopPConfig, Tag("top-p")]
    | Annotated[RandomSamplingConfig, Tag("random-sampling")]
    | Annotated[FullConfig, Tag("full")]
    | Annotated[HiddenConfig, Tag("hidden")],
    Discriminator(_kind_of),
]
TARGET_KINDS = ("head+sketch", "top-k", "top-p", "random-sampling", "full", "hidden")


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
    """What is stored of the teacher."""

    logits: LogitsConfig = Field(
        default_factory=lambda: HeadSketchConfig.model_validate({}),
        description="next-token distributions: one of the kinds below",
    )
    hidden: HiddenStatesConfig | None = Field(None, description="hidden states of chosen layers; default: none")
    attention: AttentionConfig | None = Field(None, description="attention of chosen blocks; default: none")
    boundary_mass: bool = Field(
        True,
        description="keep how probable it is that a new pre-token begins (about 1.1 bytes a position): students with other "
        "tokenizers learn from it",
    )
