"""Accelerators by their vendors' public data sheets, and what a roofline says of a teacher's forward pass on them.

A pass takes as long as its floating-point operations, or as reading the weights once a batch, whichever is longer; of the
peak of either a device is taken to reach `SHARE_OF_PEAK`.
"""

from __future__ import annotations

from dataclasses import dataclass

from teachercache.errors import RecipeError

SHARE_OF_PEAK = 0.4
WEIGHT_BYTES = 2  # of a parameter, in bf16
BESIDE_WEIGHTS = 4 * 10**9  # bytes of memory for activations and logits of a batch


@dataclass(frozen=True)
class Device:
    """Dense bf16 rate, memory and its bandwidth of one accelerator."""

    tflops: float  # 10^12 operations a second, without sparsity
    memory_gb: float  # 10^9 bytes
    bandwidth_gb: float  # 10^9 bytes a second

    def holds(self, parameters: int) -> bool:
        """Tells whether a teacher of so many parameters fits, in bf16."""
        return parameters * WEIGHT_BYTES + BESIDE_WEIGHTS <= self.memory_gb * 1e9

    def seconds(self, operations: float) -> float:
        """Time of so many floating-point operations."""
        return operations / (SHARE_OF_PEAK * self.tflops * 1e12)

    def position_seconds(self, *, operations: float, parameters: int, positions_per_batch: float) -> float:
        """Time of a position in a batch of so many, in forward passes of a teacher."""
        weights = parameters * WEIGHT_BYTES / (SHARE_OF_PEAK * self.bandwidth_gb * 1e9)
        return max(self.seconds(operations), weights / positions_per_batch)


# docs/guides/sizing.md shows the same table; a test holds them together.
DEVICES: dict[str, Device] = {
    "B200": Device(2250, 180, 8000),
    "H200": Device(989, 141, 4800),
    "H100": Device(989, 80, 3350),
    "A100": Device(312, 80, 2039),
    "A100-40GB": Device(312, 40, 1555),
    "L40S": Device(362, 48, 864),
    "L4": Device(121, 24, 300),
    "A10": Device(125, 24, 600),
    "RTX4090": Device(165, 24, 1008),
    "MI300X": Device(1307, 192, 5300),
}


def device_named(name: str) -> str:
    """The table's name of a device, which may be given in any case. Raises `RecipeError`, which lists those there are."""
    known = {key.lower(): key for key in DEVICES}
    if name.lower() not in known:
        raise RecipeError(f"--device {name} is not in the table; choose one of {', '.join(DEVICES)}")
    return known[name.lower()]
