"""The `objective:` section: what a student minimises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from teachercache.config.emphasis import EmphasisConfig
from teachercache.config.layer_losses import LAYER_LOSSES, SHARED
from teachercache.config.routing import RoutingConfig
from teachercache.schedules.known import Alpha, Scheduled, Temperature
from teachercache.schedules.numbers import MOST_TEMPERATURE, extremes_of, within
from teachercache.section import OrAdded, OrAddedName, Section
from teachercache.targets.logits.tails.policies import TAIL_POLICIES

AUTO = "auto"  # the first policy that the targets allow
if TYPE_CHECKING:
    TailName = str
    LossName = str
else:
    LossName = Literal[tuple(LAYER_LOSSES)]
    TailName = Annotated[Literal[(AUTO, *TAIL_POLICIES)], OrAddedName(TAIL_POLICIES)]


def weighs(weight: Scheduled) -> Scheduled:
    """The weight of a term; raises `ValueError` where it is negative, or never anything."""
    within(weight, name="a weight", least=0)
    if not max(extremes_of(weight)) > 0:
        raise ValueError("a weight that is always 0 leaves nothing of its term; leave the term out")
    return weight


class LayerTermConfig(Section):
    """A loss between layers of the student and the teacher's, as the cache stores them (`targets.hidden` and `.attention`)."""

    match: LossName = Field(description="which loss")
    weight: Scheduled = Field(
        1.0,
        description="of the term, beside the weights alpha and 1 - alpha of the logits' terms; a number or a schedule",
    )
    pairs: Literal["uniform", "first", "last"] | Annotated[dict[int, int], Field(min_length=1)] = Field(
        "uniform", description="which layers: by a rule, or {student's layer: teacher's layer}"
    )
    adapter: Literal["per-layer", "shared"] = Field(
        "per-layer",
        description="hidden-…: a map to the teacher's width for each pair, or one for all pairs of the term",
    )
    heads: Literal["average", "interpolate", "mix"] = Field(
        "average", description="attention-…: how the teacher's heads become as many as the student's"
    )
    first_key: bool = Field(
        True,
        description="attention-…: compare what goes to a segment's first token too; models park most of their attention "
        "there (attention sinks), which hides how the rest is shared",
    )
    relation_heads: int | None = Field(
        None, ge=1, description="…-relations: into how many heads vectors are cut; default: the student's"
    )
    centred: bool = Field(
        True, description="hidden states and structures: take the teacher's states less their mean over the corpus"
    )

    @field_validator("weight")
    @classmethod
    def _weighs(cls, value: Scheduled) -> Scheduled:
        return weighs(value)

    @model_validator(mode="after")
    def _of_this_term(self) -> LayerTermConfig:
        takes = LAYER_LOSSES[self.match].takes
        for name in SHARED:
            if name not in takes and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} means nothing to {self.match}; leave it out")
        return self


def _match_of(value: Any) -> str:
    return str(value.get("match", "") if isinstance(value, dict) else getattr(value, "match", ""))


def _added_losses() -> dict[str, type[LayerTermConfig]]:
    return {loss.name: loss.config for loss in LAYER_LOSSES.added if loss.config is not None}


LayerTerm = Annotated[LayerTermConfig, OrAdded(tuple(LAYER_LOSSES), _match_of, _added_losses)]


class AcrossTermConfig(Section):
    """A loss of a student whose tokenizer is another than the teacher's; the cache needs an alignment with it."""

    match: Literal["projected-kl", "chunk-likelihood", "sorted-probabilities"] = Field(description="which loss")
    weight: Scheduled = Field(
        1.0, description="beside other terms, a number or a schedule; all of them together are weighted by alpha"
    )
    tau: float = Field(
        100.0, ge=1, description="chunk-likelihood: binarisation temperature; likelihoods p become p^(1 / tau)"
    )
    boundaries: bool = Field(
        True,
        description="chunk-likelihood: weigh each chunk by the mass on tokens that begin a new pre-token after it",
    )

    @field_validator("weight")
    @classmethod
    def _weighs(cls, value: Scheduled) -> Scheduled:
        return weighs(value)

    @model_validator(mode="after")
    def _of_this_term(self) -> AcrossTermConfig:
        for name in ("tau", "boundaries"):
            if self.match != "chunk-likelihood" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} means nothing to {self.match}; leave it out")
        return self


ACROSS = (AcrossTermConfig(match="projected-kl"), AcrossTermConfig(match="chunk-likelihood"))


class ObjectiveConfig(Section):
    """`L = alpha * T^2 * D(teacher_T, student_T) + (1 - alpha) * CE` (Hinton, Vinyals & Dean 2015)."""

    alpha: Alpha = Field(0.9, description="from 0 to 1: a number, a schedule, or a rule that balances the two losses")
    temperature: Temperature = Field(
        1.0,
        description="any T >= 1; with targets on a grid, one of it: a number, a schedule, or one that follows the student",
    )
    divergence: Literal["forward-kl", "reverse-kl", "jensen-shannon", "total-variation"] = Field(
        "forward-kl", description="D: forward-kl covers all that the teacher does, reverse-kl seeks its main mode"
    )
    mixing: float = Field(
        0.5, gt=0, lt=1, description="the teacher's share in the mixture of jensen-shannon; 0.5 is the symmetric one"
    )
    tail: TailName = Field(
        "auto",
        description="tokens outside the head: one bucket with their exact mass (ghost), alike (uniform), dropped "
        "(renormalise) or each with its own share (sketch); auto: sketch, ghost "
        "or renormalise, the first that the targets allow; or a policy that an installed extension registers",
    )

    layers: tuple[LayerTerm, ...] = Field((), description="losses between layers, added to the ones above")
    across: tuple[AcrossTermConfig, ...] = Field(
        ACROSS,
        min_length=1,
        description="in the place of the divergence, for a student with another tokenizer than the teacher's",
    )
    emphasis: EmphasisConfig | None = Field(None, description="hard positions count more; default: all count alike")
    routing: RoutingConfig | None = Field(
        None, description="parts of the student that learn from distillation alone, or from the task alone"
    )
    gradient_cosines: int | None = Field(
        None, ge=1, description="log how far the gradients of the terms agree, at every so many optimizer steps"
    )

    @field_validator("alpha")
    @classmethod
    def _a_share(cls, value: Alpha) -> Alpha:
        return within(value, name="alpha", least=0, most=1)

    @field_validator("temperature")
    @classmethod
    def _positive(cls, value: Temperature) -> Temperature:
        return within(value, name="temperature", least=0, most=MOST_TEMPERATURE, open_below=True)

    @model_validator(mode="after")
    def _each_across_once(self) -> ObjectiveConfig:
        matches = [term.match for term in self.across]
        if len(set(matches)) < len(matches):
            raise ValueError(f"across has {max(matches, key=matches.count)} twice; give it once, with a weight")
        return self

    @model_validator(mode="after")
    def _finite_divergence(self) -> ObjectiveConfig:
        if self.divergence == "reverse-kl" and self.tail != AUTO and not TAIL_POLICIES[self.tail].keeps_mass:
            raise ValueError(
                f"reverse-kl is infinite against a tail of mass zero, which {self.tail} makes; use tail: ghost or uniform"
            )
        return self
