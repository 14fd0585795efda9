"""Settings of gradient routing: parts of the student that learn from some terms of the loss alone."""

from __future__ import annotations

from pydantic import Field, model_validator

from teachercache.section import Section


class RoutingConfig(Section):
    """Parts of the student that learn from the teacher alone, or from the text alone; all others learn from both."""

    distillation: tuple[int | str, ...] = Field(
        (),
        description="blocks by number (0: the embeddings), or names of modules and weights, * for any part of a name",
    )
    task: tuple[int | str, ...] = Field((), description="likewise: what learns from the cross-entropy alone")

    @model_validator(mode="after")
    def _routes(self) -> RoutingConfig:
        if not (self.distillation or self.task):
            raise ValueError("both lists are empty; name blocks or modules in one of them, or leave routing out")
        return self
