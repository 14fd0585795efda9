"""Rows to tensors: labels belong to the token before them, targets to labels, padding and prompts to nobody."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from teachercache.cache import Cache, StoredRow
from teachercache.stream.cache_rows import OwnRows, OwnTensors
from teachercache.stream.collate import Collator, collate
from teachercache.stream.dataset import CacheDataset
from teachercache.stream.packing import first_fit
from teachercache.targets import StoredTargets, TopK
from teachercache.tasks.contract import NO_TARGET
from teachercache.tokens.rows import Segment, TokenRow

from builders import tiny_cache

KIND = TopK(2, (1.0,), "float16", 300)
COLUMNS = ("head_ids", "head_logits")


def _row(ids: list[int], mask: list[int], starts: tuple[int, ...] = (0,)) -> StoredRow:
    segments = tuple(Segment(f"{start:032x}", 0, 0, 1, start) for start in starts)
    row = TokenRow("0" * 32, False, np.array(ids, np.int32), np.array(mask, np.bool_), segments)
    where = np.flatnonzero(row.target_mask_S)
    # Targets that say which position they were taken from.
    head_ids_N2 = np.stack([row.input_ids_S[where], row.input_ids_S[where + 1]], axis=1).astype(np.uint16)
    return StoredRow(row, {"head_ids": head_ids_N2, "head_logits": np.tile(np.float16([0, -1]), (len(where), 1))})


def test_packed_rows_keep_their_labels_targets_and_positions() -> None:
    rows = [_row([5, 6], [1, 0]), _row([11, 12, 13, 14], [1, 1, 1, 0]), _row([21, 22, 23], [1, 1, 0])]
    batch = collate(rows, layout="documents", pad_id=3, tensors=OwnTensors(StoredTargets(KIND), COLUMNS), pack_length=6)
    assert batch["input_ids"].tolist() == [[11, 12, 13, 14, 5, 6], [21, 22, 23, 3, 3, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 1, 2]]
    labels = [[12, 13, 14, NO_TARGET, 6, NO_TARGET], [22, 23, NO_TARGET, NO_TARGET, NO_TARGET, NO_TARGET]]
    assert batch["shift_labels"].tolist() == labels
    assert batch["targets"]["head_ids"].tolist() == [[11, 12], [12, 13], [13, 14], [5, 6], [21, 22], [22, 23]]


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 50))
def test_every_row_is_in_one_bin_and_no_bin_is_too_long(lengths: list[int], longest: int) -> None:
    bins = first_fit(lengths, longest=longest)
    assert sorted(index for chosen in bins for index in chosen) == list(range(len(lengths)))
    for chosen in bins:
        assert sum(lengths[index] for index in chosen) <= longest or len(chosen) == 1
    half_empty = sum(2 * sum(lengths[index] for index in chosen) <= longest for chosen in bins)
    assert half_empty <= 1  # two such bins would have been one


def test_labels_and_targets_belong_to_the_token_before() -> None:
    rows = [_row([5, 6, 7, 8], [1, 0, 1, 0]), _row([9, 10], [1, 0])]
    batch = collate(rows, layout="documents", pad_id=3, tensors=OwnTensors(StoredTargets(KIND), COLUMNS))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 10, 3, 3]]
    assert batch["shift_labels"].tolist() == [[6, NO_TARGET, 8, NO_TARGET], [10, NO_TARGET, NO_TARGET, NO_TARGET]]
    assert batch["targets"]["head_ids"].tolist() == [[5, 6], [7, 8], [9, 10]]
    assert "position_ids" not in batch and "attention_mask" not in batch


def test_no_label_crosses_the_boundary_of_packed_segments() -> None:
    batch = collate(
        [_row([5, 6, 7, 8, 9], [1, 1, 0, 1, 0], (0, 3))],
        layout="packed",
        pad_id=3,
        tensors=OwnTensors(StoredTargets(KIND), COLUMNS),
    )
    assert batch["shift_labels"].tolist() == [[6, 7, NO_TARGET, 9, NO_TARGET]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]


def test_types_are_what_a_loss_can_use() -> None:
    targets = collate(
        [_row([5, 6], [1, 0])], layout="documents", pad_id=3, tensors=OwnTensors(StoredTargets(KIND), COLUMNS)
    )["targets"]
    assert targets["head_ids"].dtype == torch.int64
    assert targets["head_logits"].dtype == torch.float32


@pytest.mark.parametrize("layout", ["documents", "packed"])
def test_an_empty_share_is_a_row_of_padding(layout: str) -> None:
    batch = collate([], layout=layout, pad_id=3, tensors=OwnTensors(StoredTargets(KIND), COLUMNS))
    assert (batch["input_ids"] == 3).all() and batch["input_ids"].shape[0] == 1
    assert (batch["shift_labels"] == NO_TARGET).all()
    assert {name: tuple(values.shape) for name, values in batch["targets"].items()} == {
        "head_ids": (0, 2),
        "head_logits": (0, 2),
    }


@pytest.mark.parametrize("layout", ["documents", "packed"])
def test_rows_of_a_real_cache_stay_aligned(tmp_path: Path, layout: str) -> None:
    cache = Cache.open(tiny_cache(tmp_path, sequence={"layout": layout}))
    columns = ("head_ids", "actual_log_prob")
    dataset = pickle.loads(pickle.dumps(CacheDataset([OwnRows(cache, columns)], "train")))
    batch = Collator.of(OwnRows(cache, columns))(dataset.__getitems__(range(len(dataset))).rows)
    labels_N = batch["shift_labels"][batch["shift_labels"] != NO_TARGET]
    assert len(labels_N) == len(batch["targets"]["head_ids"]) == cache.positions_of("train")
    # Where the label is the teacher's first choice its log-probability is that of a first choice: above log(1/V).
    first_N = batch["targets"]["head_ids"][:, 0] == labels_N
    assert (batch["targets"]["actual_log_prob"][first_N] > -np.log(cache.manifest.vocabulary_size)).all()
