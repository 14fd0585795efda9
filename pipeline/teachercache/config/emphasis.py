"""Settings of token weighting: positions of a row that count more than others."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from teachercache.section import Section


class EmphasisConfig(Section):
    """Hard positions count more in the loss of the logits: weights are proportional to score^strength in each row."""

    by: Literal["student-entropy", "teacher-entropy", "entropy-gap"] = Field(
        description="the score: entropy of the next token by the student, by the teacher, or how much more the student's is"
    )
    strength: float = Field(1.0, ge=0, description="0 weighs all that `top` keeps alike")
    top: float | None = Field(
        None, gt=0, le=1, description="share of a row's positions that count at all, those with the highest scores"
    )

    @model_validator(mode="after")
    def _emphasises(self) -> EmphasisConfig:
        if self.strength == 0 and self.top in (None, 1.0):
            raise ValueError("strength 0 without a top share emphasises nothing; leave emphasis out, or set top")
        return self
