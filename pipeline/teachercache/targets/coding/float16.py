"""float16 to float32 by moving bits: numpy's own conversion takes three times as long, and most of a row's reading."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_SIGN, _MAGNITUDE = np.uint32(0x8000), np.uint32(0x7FFF)
_SHIFT = np.uint32(13)  # float32 has so many more bits of fraction
_BIAS = np.float32(2.0**112)  # and its exponents count from 127, float16's from 15
_BEYOND = 65536.0  # what infinities and NaN come out as, at least


def float32_of(values: NDArray[Any]) -> NDArray[np.float32]:
    """The same numbers as float32, bit for bit what `astype` gives; without a copy where they are float32."""
    if values.dtype != np.float16:
        return values.astype(np.float32, copy=False)
    bits = values.view(np.uint16).astype(np.uint32)
    sign = bits & _SIGN
    bits &= _MAGNITUDE
    bits <<= _SHIFT
    moved = bits.view(np.float32)
    moved *= _BIAS
    if moved.size and moved.max() >= _BEYOND:
        return values.astype(np.float32)
    sign <<= np.uint32(16)
    bits |= sign
    return moved
