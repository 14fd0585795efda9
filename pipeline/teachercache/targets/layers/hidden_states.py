"""Hidden states of chosen layers, by one of three codecs.

    bf16        as bfloat16 rounds them; 2 bytes a channel
    int8        in steps of each channel's own spread: codes are mostly within ±127, entropy-coded, and never clipped
    projected   turned onto the principal directions of their covariance, one step for all of them, entropy-coded: directions
                that hardly vary cost hardly anything

Transformers have *massive activations* (Sun et al. 2024): a few channels, at the first token above all, are thousands of times
larger than the rest. So spreads are fitted without first tokens and outliers, and what is far outside costs bits, not
itself. Distortion follows from the step: at high rate a channel loses step²/12 of its variance, and a principal direction
is reproduced until its variance falls below step²/12 (reverse water-filling, Cover & Thomas, ch. 10).

Shapes: S tokens, D width of the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from teachercache.errors import CacheDamaged, CacheError
from teachercache.targets.coding.columns import Column
from teachercache.targets.coding.pco import NAME as PCO
from teachercache.targets.layers.claims import Count, LayerClaim
from teachercache.targets.layers.kind import RowActivations
from teachercache.targets.layers.layer_file import LayerFile
from teachercache.targets.layers.settings import Layers, LayerSettings, TeacherShape

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[Any]
# Steps by codec, in units of a channel's spread; of projected in those of all channels.
HIDDEN_STEPS = {"int8": 0.08, "projected": 0.6, "bf16": 0.0}
CODECS = tuple(HIDDEN_STEPS)
_FIRST_GROUP = 8  # directions under one table; the next groups are twice as wide each
_NOT_FINITE = 0x7F80  # exponent bits of a bfloat16 that is no number


class HiddenStatesConfig(LayerSettings):
    """Hidden states of chosen layers."""

    kind: Literal["hidden"] = Field("hidden", description="a column for each layer")
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

    def for_teacher(self, teacher: TeacherShape, *, longest: int) -> dict[str, Any]:
        """See `LayerSettings`."""
        step = HIDDEN_STEPS[self.codec] if self.step is None else self.step
        coding = {"codec": self.codec, "step": step, "calibration_positions": self.calibration_positions}
        return {**teacher.hidden(self.layers), **coding}


class HiddenStatesClaim(LayerClaim):
    """Settings in a manifest."""

    codec: str
    step: float = Field(ge=0, le=1000)
    calibration_positions: Count

    def check(self, section: str, targets: Mapping[str, Any], *, longest: int) -> None:
        """See `LayerClaim`."""
        super().check(section, targets, longest=longest)
        if self.codec != "bf16" and not self.step > 0:
            raise ValueError(f"targets.{section}.step is none")


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """Settings of the kind, and its arrays once there is a layer file. `step` is in units of a channel's spread; of codec
    projected in units of the root mean square spread of all channels."""

    kind: ClassVar[str] = "hidden"
    section: ClassVar[str] = "hidden"
    config: ClassVar[type[LayerSettings]] = HiddenStatesConfig
    claim: ClassVar[type[LayerClaim]] = HiddenStatesClaim
    attention_layers: tuple[int, ...] = ()

    layers: tuple[int, ...] = ()
    width: int = 0
    blocks: int = 0  # of the teacher
    codec: str = "int8"
    step: float = 0.0
    calibration_positions: int = 0
    layer_file: LayerFile | None = None

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> HiddenStates:
        """Rebuild from a manifest's settings."""
        if settings["codec"] not in CODECS:
            raise CacheError(f"hidden states are coded as {settings['codec']!r}, which this version cannot read")
        names = ("width", "blocks", "codec", "step", "calibration_positions")
        return cls(layers=tuple(settings["layers"]), **{name: settings[name] for name in names})

    @classmethod
    def why_unreadable(cls, settings: Mapping[str, Any]) -> str | None:
        """Returns a codec of a later version."""
        codec = settings.get("codec")
        if isinstance(codec, str) and codec not in CODECS:
            return f"the cache stores hidden states coded as {codec!r}, this version reads {', '.join(CODECS)}"
        return None

    def settings(self) -> dict[str, Any]:
        """Returns the settings that the manifest keeps."""
        names = ("width", "blocks", "codec", "step", "calibration_positions")
        return {"layers": list(self.layers), **{name: getattr(self, name) for name in names}}

    def describe(self) -> str:
        """One line for people."""
        how = "bfloat16" if self.codec == "bf16" else f"{self.codec}, step {self.step:g}"
        return f"hidden states of layers {', '.join(map(str, self.layers))} ({self.width} channels, {how})"

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """Layers to record."""
        return self.layers

    @property
    def columns(self) -> tuple[Column, ...]:
        """A column a layer."""
        return tuple(self._column(layer) for layer in self.layers)

    def _column(self, layer: int) -> Column:
        if self.codec == "bf16":
            return Column(column_of(layer), "<u2", (self.width,), of="token")
        groups = (self.width,) if self.codec == "int8" else _widening(self.width)
        return Column(column_of(layer), "<i4", (self.width,), PCO, groups=groups, of="token")

    @property
    def token_bytes(self) -> float:
        """Entropy of a normal channel in such steps, or what was measured of projected ones (docs/results/layers.md)."""
        bits = {"bf16": 16.0, "projected": 2.4}.get(self.codec) or max(1.0, np.log2(4.13 / self.step))
        return len(self.layers) * self.width * float(bits) / 8

    def arrays(self) -> dict[str, tuple[int | None, ...]]:
        """Mean and spread of each layer's channels, or of its principal directions, and these as the columns of a rotation.
        Losses use means and spreads, whatever the codec."""
        shapes: dict[str, tuple[int | None, ...]] = {}
        for layer in self.layers:
            shapes |= {f"hidden.{layer}.mean": (self.width,), f"hidden.{layer}.spread": (self.width,)}
            if self.codec == "projected":
                shapes[f"hidden.{layer}.rotation"] = (self.width, self.width)
        return shapes

    def with_layers(self, layers: LayerFile) -> HiddenStates:
        """The kind, ready to capture and to read; raises `ValueError` for arrays that are missing or of other sizes."""
        layers.check(self.arrays())
        for name in self.arrays():
            if name.endswith(".spread") and not float(layers.arrays[name].min()) > 0:
                raise ValueError(f"{name} holds what is no spread")
        return replace(self, layer_file=layers)

    def capture(self, torch: ModuleType, row: RowActivations) -> dict[str, Array]:
        """Codes of one row, [S, D] each. Raises `ValueError` for what is no number."""
        return {column_of(layer): self._coded(torch, layer, row.hidden[layer]) for layer in self.layers}

    def _coded(self, torch: ModuleType, layer: int, hidden_SD: Tensor) -> Array:
        if not bool(hidden_SD.isfinite().all()):
            raise ValueError(f"the teacher's hidden states of layer {layer} are not finite")
        if self.codec == "bf16":
            bits_SD = hidden_SD.to(torch.bfloat16).contiguous().view(torch.int16).cpu().numpy()
            if not np.all((bits_SD & _NOT_FINITE) != _NOT_FINITE):
                raise ValueError(f"hidden states of layer {layer} are beyond what bfloat16 holds")
            return bits_SD.view(np.uint16)
        mean_D, spread_D, rotation_DD = (
            None if array is None else torch.from_numpy(array).to(hidden_SD.device) for array in self._read_by(layer)
        )
        assert mean_D is not None and spread_D is not None
        centred_SD = hidden_SD.float() - mean_D
        if rotation_DD is not None:
            centred_SD = centred_SD @ rotation_DD
        codes_SD = (centred_SD / (self.step * spread_D)).round()
        if float(codes_SD.abs().max()) >= 2**31 - 128:  # float32 next to 2³¹
            raise ValueError(f"hidden states of layer {layer} are too large for codes of 32 bits")
        codes: Array = codes_SD.to(torch.int32).cpu().numpy()
        return codes

    def check_stored(self, stored: Mapping[str, Array]) -> None:
        """Raise `CacheDamaged` for a bfloat16 that is no number; codes can be any."""
        for layer in self.layers if self.codec == "bf16" else ():
            bits_SD = stored.get(column_of(layer))
            if bits_SD is not None and ((bits_SD & _NOT_FINITE) == _NOT_FINITE).any():
                raise CacheDamaged(f"column {column_of(layer)} holds what is no number")

    def decoded(self, stored: Mapping[str, Array]) -> dict[str, Array]:
        """Hidden states, float32 [S, D], of each column that is there."""
        return {
            column_of(layer): self._restored(layer, stored[column_of(layer)])
            for layer in self.layers
            if column_of(layer) in stored
        }

    def _restored(self, layer: int, codes_SD: Array) -> Array:
        if self.codec == "bf16":
            return (codes_SD.astype(np.uint32) << 16).view(np.float32)
        mean_D, spread_D, rotation_DD = self._read_by(layer)
        centred_SD = codes_SD.astype(np.float32)
        centred_SD *= np.float32(self.step) * spread_D
        if rotation_DD is not None:
            centred_SD = centred_SD @ rotation_DD.T
        centred_SD += mean_D
        return centred_SD

    def _read_by(self, layer: int) -> tuple[Array, Array, Array | None]:
        """Mean, unit of the step, and rotation."""
        if self.layer_file is None:
            raise CacheError("hidden states are read with the layer file in the cache's teacher/ folder")
        arrays = self.layer_file.arrays
        spread_D = arrays[f"hidden.{layer}.spread"]
        if self.codec == "projected":  # one step for all directions
            spread_D = np.full_like(spread_D, np.sqrt(np.mean(spread_D.astype(np.float64) ** 2)))
        return arrays[f"hidden.{layer}.mean"], spread_D, arrays.get(f"hidden.{layer}.rotation")


def column_of(layer: int) -> str:
    """Name of the column that holds a layer's hidden states."""
    return f"hidden_{layer}"


def _widening(width: int) -> tuple[int, ...]:
    """Groups of directions that vary alike: the first few vary much more than the next."""
    groups: list[int] = []
    size = _FIRST_GROUP
    while sum(groups) < width:
        groups.append(min(size, width - sum(groups)))
        size *= 2
    return tuple(groups)
