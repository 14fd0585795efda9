"""Hidden states survive their codecs: what is lost follows from the step, and nothing is clipped."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from teachercache.errors import CacheDamaged
from teachercache.targets.layers.hidden_states import HiddenStates
from teachercache.targets.layers.kind import RowActivations
from teachercache.targets.layers.layer_file import LayerFile

S, D = 200, 48


def states(seed: int = 0, *, massive: bool = True) -> torch.Tensor:
    """Channels of different means and spreads, correlated; the first token is thousands of times as large in two of them."""
    generator = torch.Generator().manual_seed(seed)
    mixed_SD = (
        torch.randn(S, D, generator=generator) @ torch.randn(D, D, generator=generator) * torch.logspace(-2, 1, D)
    )
    mixed_SD += torch.randn(D, generator=torch.Generator().manual_seed(9)) * torch.logspace(-2, 1, D)
    if massive:
        mixed_SD[0, [3, 40]] = torch.tensor([-30_000.0, 8_000.0])
    return mixed_SD


def row_of(hidden_SD: torch.Tensor) -> RowActivations:
    return RowActivations({5: hidden_SD}, {}, {}, {}, {}, {}, np.zeros(len(hidden_SD), dtype=np.int64))


def kind_of(codec: str, *, step: float, dtype: str = "float32") -> HiddenStates:
    from teachercache.teacher.layers import hidden_arrays

    arrays = hidden_arrays(states(massive=False), 5, rotated=codec == "projected")
    kind = HiddenStates(layers=(5,), width=D, blocks=8, codec=codec, step=step, calibration_positions=64)
    return kind.with_layers(LayerFile(arrays))


def restored(kind: HiddenStates, hidden_SD: torch.Tensor) -> tuple[np.ndarray, int]:
    """As a reader of a shard gets them, and the bytes of the row."""
    stored = kind.capture(torch, row_of(hidden_SD))
    [column] = kind.columns
    tables, [page] = column.encode([stored["hidden_5"]])
    read = {"hidden_5": column.decoder(tables)(page, len(hidden_SD))}
    kind.check_stored(read)
    return kind.decoded(read)["hidden_5"], len(page)


def test_bf16_keeps_what_bfloat16_keeps() -> None:
    hidden_SD = states()
    found, size = restored(kind_of("bf16", step=0.0), hidden_SD)
    np.testing.assert_array_equal(found, hidden_SD.to(torch.bfloat16).float().numpy())
    assert size == 2 * S * D


@pytest.mark.parametrize("step", [0.02, 0.11, 0.5])
def test_int8_is_off_by_half_a_step_of_each_channel_at_most(step: float) -> None:
    kind, hidden_SD = kind_of("int8", step=step), states(1)
    found, _ = restored(kind, hidden_SD)
    assert kind.layer_file is not None
    spread_D = kind.layer_file.arrays["hidden.5.spread"]
    off_SD = np.abs(found - hidden_SD.numpy())
    assert (off_SD[1:] <= 0.5001 * step * spread_D + 1e-5).all()
    # The massive token as well, up to float32's own rounding.
    np.testing.assert_allclose(found[0], hidden_SD[0].numpy(), atol=float(0.51 * step * spread_D.max()), rtol=1e-6)


def test_projected_loses_as_much_in_every_direction_or_all_of_it() -> None:
    kind, hidden_SD = kind_of("projected", step=0.3), states(1)
    found, _ = restored(kind, hidden_SD)
    assert kind.layer_file is not None
    arrays = kind.layer_file.arrays
    rotation_DD, spread_D = arrays["hidden.5.rotation"], arrays["hidden.5.spread"]
    np.testing.assert_allclose(rotation_DD.T @ rotation_DD, np.eye(D), atol=1e-5)
    assert (np.diff(spread_D) <= 1e-6).all()
    off_SD = (found - hidden_SD.numpy())[1:] @ rotation_DD
    assert np.abs(off_SD).max() <= 0.501 * 0.3 * np.sqrt((spread_D**2).mean())


def test_a_finer_step_costs_bits_and_a_massive_activation_hardly_any() -> None:
    plain = states(1, massive=False)
    sizes = [restored(kind_of("int8", step=step), plain)[1] for step in (0.5, 0.25, 0.125)]
    for coarse, fine in itertools.pairwise(sizes):
        assert 0.7 * S * D / 8 < fine - coarse < 1.3 * S * D / 8, "half the step is a bit more for each number"
    assert restored(kind_of("int8", step=0.125), states(1))[1] < 1.02 * sizes[-1]


def test_what_is_no_number_is_not_stored() -> None:
    hidden_SD = states()
    hidden_SD[7, 7] = torch.nan
    for codec, step in (("bf16", 0.0), ("int8", 0.1), ("projected", 0.5)):
        with pytest.raises(ValueError, match="the teacher's hidden states of layer 5 are not finite"):
            kind_of(codec, step=step).capture(torch, row_of(hidden_SD))
    hidden_SD[7, 7] = 3.4e38
    with pytest.raises(ValueError, match="beyond what bfloat16 holds"):
        kind_of("bf16", step=0.0).capture(torch, row_of(hidden_SD))
    with pytest.raises(ValueError, match="too large for codes of 32 bits"):
        kind_of("int8", step=0.1).capture(torch, row_of(hidden_SD))


def test_a_bfloat16_that_is_no_number_is_damage() -> None:
    kind = kind_of("bf16", step=0.0)
    stored = dict(kind.capture(torch, row_of(states())))
    stored["hidden_5"][3, 3] = 0x7FC1
    with pytest.raises(CacheDamaged, match="column hidden_5 holds what is no number"):
        kind.check_stored(stored)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("hidden.5.mean"), "hidden.5.mean is missing"),
        (lambda arrays: arrays.update({"hidden.5.mean": np.zeros(3, np.float32)}), r"is of shape \(3,\), not \(48,\)"),
        (lambda arrays: arrays.update({"hidden.5.spread": np.zeros(D, np.float32)}), "holds what is no spread"),
    ],
)
def test_a_layer_file_of_other_layers_is_refused(change: Any, message: str) -> None:
    kind = kind_of("int8", step=0.1)
    assert kind.layer_file is not None
    arrays = dict(kind.layer_file.arrays)
    change(arrays)
    with pytest.raises(ValueError, match=message):
        kind.with_layers(LayerFile(arrays))
