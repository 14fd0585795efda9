"""The `targets:` section: what is stored of a teacher. The settings of kinds stand beside them, in `teachercache.targets`."""

from __future__ import annotations

from pydantic import Field

from teachercache.section import Section
from teachercache.targets.layers.kinds import AttentionTargets, HiddenTargets
from teachercache.targets.logits.kinds import DEFAULT, LogitsConfig


class TargetsConfig(Section):
    """Targets that are stored of the teacher."""

    logits: LogitsConfig = Field(
        default_factory=lambda: DEFAULT.config.model_validate({}),
        description="next-token distributions: one of the kinds below",
    )
    hidden: HiddenTargets | None = Field(None, description="hidden states of chosen layers; default: none")
    attention: AttentionTargets | None = Field(
        None, description="attention of chosen blocks: one of the kinds below; default: none"
    )
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
