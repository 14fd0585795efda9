"""The sketch basis: what turns r coefficients back into V logits. One file a cache, written by calibration.

With h the input of the teacher's output layer, W its weights and b its bias, the logits are g(W·h + b). Let mean and Σ
belong to h on a calibration sample, m to its tokens: the mean probability of each outside the head, over T = 1, 2 and 4.
An error ε of the logits costs T²·KL = ½ E Σ p·ε², so tokens count by m; W_c is W less its mean by m (softmax does not see
the difference). The directions are those of m^½·W_c·Σ^½, largest first (a singular value decomposition), so that `basis`
has as its columns what one unit of each coefficient adds to every logit; units are chosen such that the root mean square
of that by m is 1: one quantisation step costs the same in each direction.

    logits ≈ basis · coefficients + base                    (up to a constant, which softmax does not see)

What quantisation loses shows as a bias per token, different at each temperature. It is fitted at T = 1 and 4, by matching
each token's mean probability outside the head:

    bias(T) = constant + slope · (1/T - curve · (1 - 1/T) · (1/T - 1/4))

Logits that lack a normal error of variance σ² lack σ²/2T² in a token's log-probability: with curve = 0.8 the bias is one of
1/T². Files without a curve are of a bias straight in 1/T; a reader that does not know it is right at T = 1 and 4.

Kind `hidden` stores h itself: its directions are the channels, r = D, and its basis is W. It has no biases, and ranks and
weights, which serve heads, are empty.

Shapes: V vocabulary, D width of h, r directions, F features, G nodes of the tail.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from teachercache.errors import CacheDamaged
from teachercache.targets.coding.safetensors_file import load_named, save_named
from teachercache.targets.logits.softened import SketchTail

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[Any]
PREFIX = "sketch-"
METADATA_KEY = "teachercache-sketch"
BIAS_TEMPERATURES = (1.0, 4.0)


@dataclass(frozen=True, eq=False)
class SketchBasis:
    """Arrays of one basis. `mean` and `analysis` serve capture alone, the others reading."""

    mean_D: Array  # float32
    analysis_Dr: Array  # float32: coefficients = (h - mean) · analysis; of kind hidden [D]: a factor for each channel
    basis_Vr: Array  # float16; of kind hidden float32 where the steps are finer than float16's rounding
    base_V: Array  # float32
    bias_constant_V: Array  # float16, in units of logit / T
    bias_slope_V: Array  # float16, likewise, what 1 / T is worth
    token_of_rank_V: Array  # uint32: tokens, the most frequent in heads first
    tail_weights_GF: Array  # float32: linear prediction of the tail's nodes, see tail.py
    softcap: float | None = None
    step: float | None = None  # where calibration chose it
    chosen: dict[str, Any] | None = (
        None  # by a target: rank and step, what they cost and leave, and what else was tried
    )
    bias_curve: float = 0.0
    copies: dict[Any, Any] = field(default_factory=dict, repr=False)  # of arrays, by use, type and device

    @property
    def rank(self) -> int:
        """Number of directions."""
        return int(self.basis_Vr.shape[1])

    @property
    def vocabulary_size(self) -> int:
        """Tokens that the basis gives logits of."""
        return int(self.basis_Vr.shape[0])

    @cached_property
    def rank_of_token_V(self) -> Array:
        """Inverse of `token_of_rank_V`."""
        ranks_V = np.empty(self.vocabulary_size, dtype=np.uint32)
        ranks_V[self.token_of_rank_V] = np.arange(self.vocabulary_size, dtype=np.uint32)
        return ranks_V

    def first(self, rank: int) -> SketchBasis:
        """The basis of the `rank` leading directions."""
        analysis_Dr, basis_Vr = (np.ascontiguousarray(array[:, :rank]) for array in (self.analysis_Dr, self.basis_Vr))
        return replace(self, analysis_Dr=analysis_Dr, basis_Vr=basis_Vr, copies={})

    def tail(self, coefficients_Nr: Any, temperature: float) -> SketchTail:
        """The logits of N positions at a temperature, from coefficients of numpy's or torch's, on any device."""
        basis_Vr, base_V, constant_V, slope_V = self._reading_arrays(coefficients_Nr)
        low, high = BIAS_TEMPERATURES
        bent = self.bias_curve * (1 / low - 1 / temperature) * (1 / temperature - 1 / high)
        # Bases without a curve read to the bit as they always did.
        bias_V = constant_V + slope_V * (1 / temperature - bent) if bent else constant_V + slope_V / temperature
        if self.softcap is not None:
            return SketchTail(coefficients_Nr, basis_Vr, base_V, self.softcap, temperature, bias_V)
        return SketchTail(coefficients_Nr / temperature, basis_Vr, base_V / temperature + bias_V)

    def capturing_arrays(self, torch: ModuleType, device: Any) -> tuple[Tensor, Tensor]:
        """`mean_D` and `analysis_Dr` where they are used; brought there once."""
        key = ("capture", str(device))
        if key not in self.copies:
            self.copies[key] = tuple(torch.from_numpy(array).to(device) for array in (self.mean_D, self.analysis_Dr))
        copies: tuple[Tensor, Tensor] = self.copies[key]
        return copies

    def _reading_arrays(self, like: Any) -> tuple[Any, Any, Any, Any]:
        """Basis, base and the two biases with the type, module and device of an array; made once for each."""
        key = ("numpy", str(like.dtype)) if isinstance(like, np.ndarray) else (str(like.device), str(like.dtype))
        if key not in self.copies:
            arrays = (self.basis_Vr, self.base_V, self.bias_constant_V, self.bias_slope_V)
            if isinstance(like, np.ndarray):
                self.copies[key] = tuple(array.astype(like.dtype) for array in arrays)
            else:
                self.copies[key] = tuple(like.new_tensor(array.astype(np.float32)) for array in arrays)
        copies: tuple[Any, Any, Any, Any] = self.copies[key]
        return copies

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "copies": {}}

    def save(self, folder: Path) -> Path:
        """Write it as safetensors, named by its content; returns the path."""
        names = [
            entry.name
            for entry in fields(self)
            if entry.name not in ("softcap", "step", "chosen", "bias_curve", "copies")
        ]
        arrays = {name: getattr(self, name) for name in names}
        described: dict[str, Any] = {"version": 1, "softcap": self.softcap, "step": self.step}
        if self.chosen is not None:
            described["chosen"] = self.chosen
        if self.bias_curve:
            described["bias_curve"] = self.bias_curve
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        return save_named(contiguous, {METADATA_KEY: json.dumps(described)}, folder, prefix=PREFIX)

    @classmethod
    def load(cls, path: Path) -> SketchBasis:
        """Read a basis; raises `CacheDamaged` when the file is missing or is no basis."""
        try:
            arrays, described = load_named(path, key=METADATA_KEY)
            basis = cls(**arrays, softcap=described["softcap"], step=described["step"])
            basis = replace(basis, chosen=described.get("chosen"), bias_curve=described.get("bias_curve", 0.0))
            basis.check()
            return basis
        except (KeyError, TypeError, ValueError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise CacheDamaged(f"{path} is no sketch basis ({reason}); fetch the cache again") from None

    def check(self) -> None:
        """Raise `ValueError` for arrays that do not fit together, are of other types, or hold what is no number."""
        for name, kinds in _TYPES.items():
            array = getattr(self, name)
            if array.ndim != (_DIMENSIONS.get(name, 1)) and not (name == "analysis_Dr" and array.ndim == 1):
                raise ValueError(f"{name} has {array.ndim} dimensions")
            if array.dtype.str not in kinds:
                raise ValueError(f"{name} is of type {array.dtype.str}")
            if array.dtype.kind == "f" and not _within(array, LARGEST):
                raise ValueError(f"{name} holds what is no number, or is beyond {LARGEST:g}")
        sizes = {len(array) for array in (self.basis_Vr, self.base_V, self.bias_constant_V, self.bias_slope_V)}
        inputs, width = len(self.mean_D), self.analysis_Dr.shape
        if len(sizes) != 1 or width not in ((inputs, self.rank), (self.rank,)) or not 1 <= self.rank <= inputs:
            raise ValueError("its arrays are of sizes that do not fit together")
        ranks_V = self.token_of_rank_V
        if len(ranks_V) and (len(ranks_V) != self.vocabulary_size or not _is_permutation(ranks_V)):
            raise ValueError("token_of_rank_V does not name each token once")
        for name in ("softcap", "step"):
            value = getattr(self, name)
            if value is not None and not (type(value) in (int, float) and 0 < value <= LARGEST):
                raise ValueError(f"its {name} is no positive number")
        if type(self.bias_curve) not in (int, float) or not 0 <= self.bias_curve <= 1:
            raise ValueError("its bias_curve is no number between 0 and 1")


LARGEST = 1e9  # magnitude of anything in a basis: sums of products with codes stay finite in float32
_TYPES = {
    "mean_D": ("<f4",), "analysis_Dr": ("<f4",), "basis_Vr": ("<f2", "<f4"), "base_V": ("<f4",),
    "bias_constant_V": ("<f2",), "bias_slope_V": ("<f2",), "token_of_rank_V": ("<u4",), "tail_weights_GF": ("<f4",),
}  # fmt: skip
_DIMENSIONS = {"analysis_Dr": 2, "basis_Vr": 2, "tail_weights_GF": 2}


def _within(array: Array, largest: float) -> bool:
    """Tells whether magnitudes are numbers up to `largest`. By their bits: numpy compares 16-bit floats one by one."""
    width = array.dtype.itemsize
    limit = np.array(min(largest, float(np.finfo(array.dtype).max)), array.dtype).view(f"<u{width}")
    magnitudes = array.view(f"<u{width}") & np.array(2 ** (8 * width - 1) - 1, f"<u{width}")
    return array.size == 0 or bool(magnitudes.max() <= limit)


def _is_permutation(ranks_V: Array) -> bool:
    """Tells whether every number below their count is there, once each."""
    return int(ranks_V.max()) < len(ranks_V) and bool((np.bincount(ranks_V, minlength=len(ranks_V)) == 1).all())
