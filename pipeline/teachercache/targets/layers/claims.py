"""Claims of a manifest about layers, checked when a cache is opened: settings that no cache can have are refused there.

Digests tell that bytes are those that somebody wrote, not that they make sense.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Number = Annotated[int, Field(ge=1, le=2**20)]  # of layers, heads or channels
Count = Annotated[int, Field(ge=0, le=2**53)]
Step = Annotated[float, Field(gt=0, le=1000)]


class LayerClaim(BaseModel):
    """Settings that readers of every kind rely on; others are free. A kind adds its own."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    layers: list[Annotated[int, Field(ge=0, le=2**20)]] = Field(min_length=1)
    width: Number
    blocks: Number

    def check(self, section: str, targets: Mapping[str, Any], *, longest: int) -> None:
        """Raise `ValueError` for settings that contradict each other, others of the manifest's `targets`, or rows of `longest`
        tokens."""
        if sorted(set(self.layers)) != self.layers or self.layers[-1] > self.blocks:
            raise ValueError(
                f"targets.{section}.layers do not rise, each once, up to the teacher's {self.blocks} blocks"
            )


class AttentionClaim(LayerClaim):
    """Settings of every kind of attention."""

    layers: list[Number] = Field(min_length=1)
    heads: Number
    key_heads: Number
    head_width: Number

    @property
    def all_heads(self) -> int:
        """Heads of the teacher."""
        return self.heads

    def check(self, section: str, targets: Mapping[str, Any], *, longest: int) -> None:
        """See `LayerClaim`."""
        super().check(section, targets, longest=longest)
        if self.all_heads % self.key_heads or self.all_heads % self.heads:
            raise ValueError(
                f"targets.attention has {self.all_heads} heads, {self.key_heads} of keys, and {self.heads} of them stored"
            )
