"""The process that holds the teacher: obeys the supervisor (supervisor.py), and says which rows it is about to read.

It may raise, hang or die; what it has written by then is whole (units.py).
"""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

# What loading a model imports: by the server, once, and not by each process that is forked from it.
import transformers.modeling_utils
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers.utils.logging import disable_progress_bar

from teachercache.corpus.sequences import Quarantined, Tokenised
from teachercache.errors import JobFailed, ModelError, TeachercacheError
from teachercache.files import DISK_FULL
from teachercache.precompute.capture.given_calibration import check_loaded
from teachercache.precompute.capture.input_form import check_input
from teachercache.precompute.capture.job_facts import Job
from teachercache.precompute.capture.unit_tokens import document_key, tokenise_unit
from teachercache.precompute.capture.units import (
    UnitReport,
    actor_threads,
    calibrate,
    calibration_rows,
    compute_unit,
)
from teachercache.teacher import Teacher
from teachercache.tokens.rows import Segment, TokenRow


def serve(connection: Any) -> None:
    """Obey until the connection ends. The first message is the job; then each is a method of `TeacherProcess` with its
    arguments, and gets one answer: `(done, result)`, `(refused, error)` or `(raised, text)`. Before it come messages `(rows,
    ids)` of the rows in the forward pass that begins, none where passes are over."""
    disable_progress_bar()  # what it prints last is told of a process that dies
    process = TeacherProcess(connection.recv(), connection)
    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:
            return
        connection.send(_answered(process, name, arguments))


def _answered(process: TeacherProcess, name: str, arguments: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        return "done", getattr(process, name)(*arguments)
    except TeachercacheError as error:
        return "refused", type(error)(str(error))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is no `Exception`
        traceback.print_exc()
        said = f"{type(error).__name__}: {error}"
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return "refused", JobFailed(f"{said}; make room and run the same command again to go on")
        return "raised", said


class TeacherProcess:
    """A teacher, and the unit that it works on."""

    def __init__(self, job: Job, connection: Any) -> None:
        self.job, self._connection = job, connection
        self._rows: dict[str, TokenRow] = {}
        self._unit, self._documents, self._tokenised = 0, 0, Tokenised()

    def load(self) -> None:
        """Load the teacher."""
        self._teacher.on_batch = self._tell

    @cached_property
    def _teacher(self) -> Teacher:
        return load_teacher(self.job)

    @property
    def _size(self) -> int:
        return self.job.precompute.positions_per_batch

    def _tell(self, rows: Sequence[TokenRow]) -> None:
        self._connection.send(("rows", tuple(row.row_id for row in rows)))

    def check_input(self) -> None:
        """See `input_form.check_input`."""
        check_input(self._teacher, self.job.plan, positions_per_batch=self._size)

    def take(self, unit: int, payload: bytes) -> None:
        """Take a unit that is tokenised."""
        self._unit = unit
        self._tokenised, self._documents = pickle.loads(payload)
        self._rows = {row.row_id: row for row in self._tokenised.rows}

    def documents(self, unit: int) -> list[str]:
        """Names of a unit's documents."""
        return [document_key(document) for document in self.job.plan.documents(unit)]

    def tokenise(self, unit: int, only: Collection[str] | None, lost: Mapping[str, str]) -> bytes:
        """Tokenise a unit, or some of its documents, without those that are lost, which are put into quarantine."""
        tokenised, count = tokenise_unit(
            self.job.plan,
            unit,
            sequence=self.job.sequence,
            store_text=self.job.corpus.store_text,
            keep=lambda key: key not in lost and (only is None or key in only),
        )
        documents = self.job.plan.documents(unit) if lost else []
        tokenised.quarantined += [
            Quarantined(document.source_id, document.occurrence, lost[key], (document.text or "")[:200])
            for document in documents
            if (key := document_key(document)) in lost
        ]
        return pickle.dumps((tokenised, count)) if only is None else b""

    def compute(self, lost: Mapping[str, str], positions_per_batch: int) -> UnitReport:
        """Capture and write the unit; rows that are lost go to quarantine with their reasons."""
        return compute_unit(
            self._teacher,
            self.job.plan,
            self._unit,
            self._tokenised,
            documents=self._documents,
            positions_per_batch=positions_per_batch,
            lost=lost,
        )

    def probe(self, rows: Collection[str]) -> None:
        """Capture some rows of the unit and forget them."""
        self._teacher.capture([self._rows[name] for name in rows], positions_per_batch=self._size)
        self._tell([])

    def sample(self) -> None:
        """Take the rows that calibration reads."""
        rows = calibration_rows(self.job.plan, sequence=self.job.sequence)
        self._rows = {row.row_id: row for row in rows}

    def read(self, rows: Collection[str]) -> None:
        """Run the teacher over some rows of the sample."""
        self._teacher.label_nats([self._rows[name] for name in rows], positions_per_batch=self._size)
        self._tell([])

    def calibrate(self, lost: Collection[str]) -> None:
        """See `units.calibrate`."""
        calibrate(
            self._teacher,
            self.job.plan,
            sequence=self.job.sequence,
            positions_per_batch=self._size,
            without=lost,
        )

    def rehearse(self) -> None:
        """Run the teacher over two padding tokens: raises where it can do no more."""
        ids_S = np.full(2, self.job.plan.identity["tokenizer"]["pad_id"], np.int32)
        row = TokenRow("", False, ids_S, np.array([True, False]), (Segment("", 0, 0, 0, 0),))
        self._teacher.label_nats([row], positions_per_batch=self._size)


def load_teacher(job: Job) -> Teacher:
    """Load the teacher of a job on the device that its placement gives. Raises `ModelError`, and `CacheError` where it is not
    as the calibration that the job has taken says."""
    import torch

    torch.set_num_threads(actor_threads(job.precompute))
    device = "cuda" if job.placement.gpus else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            f"the actor on {os.uname().nodename} has a GPU, which its torch {torch.__version__} cannot use; install a build of "
            "torch for this GPU, or set precompute.gpus_per_actor: 0 to run on the CPU"
        )
    pad_id = job.plan.identity["tokenizer"]["pad_id"]
    teacher = Teacher.load(
        job.teacher,
        targets=job.plan.loaded_targets(),
        layout=job.sequence.layout,
        pad_id=pad_id,
        longest=job.sequence.length,
        device=device,
    )
    check_loaded(job.plan, teacher.describe())
    return teacher
