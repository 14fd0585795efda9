"""A layer file: what the stored layers of one section are read by, as safetensors, named by its content.

Arrays go by `SECTION.LAYER.NAME`, as in `hidden.8.mean`; the header says of attention how scores are formed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teachercache.errors import CacheDamaged
from teachercache.targets.coding.safetensors_file import load_named, save_named
from teachercache.targets.layers.attention import HeadShape

PREFIX = "layers-"
METADATA_KEY = "teachercache-layers"
LARGEST = 1e9  # magnitude of anything in it: sums of products with codes stay finite in float32


@dataclass(frozen=True, eq=False)
class LayerFile:
    """Arrays, float32, and what is said of each attention layer."""

    arrays: Mapping[str, NDArray[Any]]
    attention: Mapping[int, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> Path:
        """Write it, named by its content; returns the path."""
        described = {"version": 1, "attention": {str(layer): entry for layer, entry in self.attention.items()}}
        arrays = {name: np.ascontiguousarray(values, dtype=np.float32) for name, values in self.arrays.items()}
        metadata = {METADATA_KEY: json.dumps(described, sort_keys=True)}
        return save_named(arrays, metadata, folder, prefix=PREFIX)

    @classmethod
    def load(cls, path: Path) -> LayerFile:
        """Read one; raises `CacheDamaged` when the file is missing or is no layer file."""
        try:
            arrays, described = load_named(path, key=METADATA_KEY)
            for name, values in arrays.items():
                if values.dtype != np.float32:
                    raise ValueError(f"{name} is of type {values.dtype.str}")
                if values.size and not float(np.abs(values).max()) <= LARGEST:
                    raise ValueError(f"{name} holds what is no number, or is beyond {LARGEST:g}")
            return cls(arrays, {int(layer): dict(entry) for layer, entry in described["attention"].items()})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise no_layer_file(path, error) from None

    def check(self, shapes: Mapping[str, tuple[int | None, ...]]) -> None:
        """Raise `ValueError` where an array that is asked for is missing or has another shape."""
        for name, wanted in shapes.items():
            if name not in self.arrays:
                raise ValueError(f"{name} is missing")
            shape = self.arrays[name].shape
            fits = (size in (None, here) for size, here in zip(wanted, shape, strict=False))
            if len(shape) != len(wanted) or not all(fits):
                raise ValueError(f"{name} is of shape {shape}, not {wanted}")

    def head_shapes(self, layers: Sequence[int], wanted: tuple[int, int, int]) -> dict[int, HeadShape]:
        """Returns the shapes of blocks' heads. Raises `ValueError` unless each has the heads, heads of keys and head's
        width `wanted`."""
        described = {}
        for layer in layers:
            if layer not in self.attention:
                raise ValueError(f"it does not describe the attention of block {layer}")
            shape = described[layer] = HeadShape.from_metadata(self.attention[layer]["shape"])
            counts = (shape.heads, shape.key_heads, shape.head_width)
            if counts != wanted:
                raise ValueError(f"the attention of block {layer} has heads {counts}, the manifest says {wanted}")
        return described


def no_layer_file(path: Path | str, error: BaseException) -> CacheDamaged:
    """In one line, with the remedy."""
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return CacheDamaged(f"{path} is no layer file of this cache ({reason}); fetch the cache again")
