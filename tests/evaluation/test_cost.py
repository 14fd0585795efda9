"""Times and weights that a summary has. No test depends on how fast the machine is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from teachercache.evaluation.cost import LONGEST_TIMED, MemoryMeter, speed, timed_tokens, weight_bytes
from teachercache.models.loading import load_causal_lm
from teachercache.tokens.rows import TokenRow

from builders import tiny_model


def _row(length: int) -> TokenRow:
    return TokenRow("0", True, np.arange(length, dtype=np.int32), np.ones(length, dtype=np.bool_), ())


@pytest.mark.parametrize(("length", "timed"), [(5, 5), (LONGEST_TIMED + 9, LONGEST_TIMED)])
def test_timed_tokens_are_real_and_bounded(length: int, timed: int) -> None:
    assert timed_tokens(_row(length)).tolist() == [list(range(timed))]


def test_speed_says_what_it_measured() -> None:
    measured = speed(tiny_model(), timed_tokens(_row(20)), batch_rows=4)
    assert measured["latency_ms"] > 0 and measured["throughput"] > 0
    assert (measured["latency_tokens"], measured["throughput_batch"]) == (20, 4)


def test_tied_weights_weigh_once() -> None:
    tied, untied = tiny_model(tied=True), tiny_model(tied=False)
    assert weight_bytes(untied) - weight_bytes(tied) == 4 * 300 * 32


def test_memory_is_what_the_loaded_weights_add(tmp_path: Path) -> None:
    """64 MB of weights show up in the resident set, also where they are mapped from a file and not yet read."""
    made = tiny_model(vocabulary=8000, hidden=2000, layers=0)
    made.save_pretrained(tmp_path)
    expected = weight_bytes(made) / 1e6
    del made
    meter = MemoryMeter(torch.device("cpu"))
    model = load_causal_lm(str(tmp_path))
    measured = meter.read(model, timed_tokens(_row(4)))
    assert measured["weights_mb"] == pytest.approx(expected, rel=0.01)
    assert measured["memory_mb"] == pytest.approx(expected, rel=0.3)
    assert measured["memory_is"] == "resident set"
