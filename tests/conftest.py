"""Tests reach no model hub and send nothing anywhere."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from s3_server import Server

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Several processes on few cores crawl when each of them spins on all cores; child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray's workers stand behind everything else (nice 15): beside another test file they would hardly run at all.
os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.fixture(scope="module", autouse=True)
def libraries_out_of_collections() -> None:
    """Objects that live before a file's first test, of torch and transformers above all, are not looked at again by each
    garbage collection: trainers call for one at the end of each run, which took half of a tiny run's time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def s3_process() -> Iterator[Server]:
    """One S3 server for all tests."""
    from s3_server import s3_server

    with s3_server() as server:
        yield server


@pytest.fixture
def s3(s3_process: Server) -> Server:
    """The S3 server, without faults and with an empty log."""
    s3_process.forget()
    return s3_process
