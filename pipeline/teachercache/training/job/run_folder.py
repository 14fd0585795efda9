"""OUTPUT, the folder of a run.

run.json        whose run this is: the cache's fingerprint, the weights that it began with, and every setting that
                decides what is learned
checkpoint-N/   see checkpoints/completion.py
damaged-checkpoint-N/   the last one whose bytes were not those that were written, kept for whoever needs it
log.jsonl       log records
course.jsonl    alpha, temperature and weights of each step, where any of them changes during the run
runs/           trackers' files
student/        the exported student
adapters/       its adapters by themselves, where `student.lora` trained them
summary.json    written last: the run is finished, and this is what it said
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teachercache.cache.files.regular_files import MOST_MANIFEST_BYTES, read_regular
from teachercache.config import PhaseConfig, Recipe, parse_recipe
from teachercache.config.location import folder_name
from teachercache.errors import CacheDamaged, CacheError, RecipeError
from teachercache.files import locked, write_whole
from teachercache.nested import ABSENT, differences
from teachercache.stream.order.shuffle_windows import ORDER
from teachercache.training.checkpoints.completion import Checkpoint, complete_checkpoints

# They change where, how fast or how often, but not what is learned (micro_batch: but for rounding).
FREE_SETTINGS = {
    "output",
    "deepspeed",  # its content counts, not its name
    "micro_batch",
    "gradient_checkpointing",
    "evaluate_every",
    "save_every",
    "keep_checkpoints",
    "log_every",
    "loader_workers",
    "trackers",
    "gradient_cosines",
}


@dataclass(frozen=True)
class RunIdentity:
    """Whose run it is. `student_weights` pins what the run begins with, which a path does not, as
    `models.loading.weights_identity` does; `deepspeed` is the content of the user's own DeepSpeed file, `order` the
    version of the arithmetic that orders rows."""

    recipe: Recipe
    cache_fingerprint: str
    student_weights: dict[str, str | None]
    deepspeed: dict[str, Any] | None
    mixed_fingerprints: tuple[str, ...] = ()
    alignments: tuple[str, ...] = ()  # fingerprints of those that the rows are aligned by
    teachers: dict[str, Any] | None = None  # as `Teachers.identity` says
    order: int = ORDER
    held_out: float | None = None  # the largest share that any cache holds out, where rows of others are left out by it

    def decisive(self) -> dict[str, Any]:
        """Returns the part that decides what is learned: two runs that are equal in it are one run."""
        recipe = self.recipe.model_dump(mode="json", include={"student", "objective", "train"})
        train = {key: value for key, value in recipe["train"].items() if key not in FREE_SETTINGS}
        objective = {key: value for key, value in recipe["objective"].items() if key not in FREE_SETTINGS}
        student = {**self.student_weights, **recipe["student"]}
        shares = [source.share for source in self.recipe.stream.mix]
        stream = {
            "order": self.order,
            "window": self.recipe.stream.window,
            "mix": [list(pair) for pair in zip(self.mixed_fingerprints, shares, strict=True)],
        }
        decisive = {**recipe, "student": student, "objective": objective, "train": train, "stream": stream}
        if self.recipe.phases:
            decisive["phases"] = [self._decisive_of(phase) for phase in self.recipe.phases]
        if self.teachers is not None:
            decisive["teachers"] = self.teachers
        if self.recipe.teachers is not None and self.recipe.teachers.weights == "validation-student":
            # Its weights follow evaluations.
            decisive["train"] = {**train, "evaluate_every": recipe["train"]["evaluate_every"]}
        if self.held_out is not None:
            decisive["held_out"] = self.held_out
        if self.alignments:
            decisive["alignments"] = list(self.alignments)
        return {**decisive, "cache": self.cache_fingerprint, "deepspeed": self.deepspeed}

    def _decisive_of(self, phase: PhaseConfig) -> dict[str, Any]:
        """Shares by the order of the caches, whose folders may be moved."""
        settings = phase.model_dump(mode="json", exclude={"mix", "name"})
        locations = (self.recipe.cache, *(source.cache for source in self.recipe.stream.mix))
        return settings | (
            {} if phase.mix is None else {"mix": [phase.mix.get(folder_name(location), 0) for location in locations]}
        )

    def to_json(self) -> dict[str, Any]:
        """The content of run.json."""
        recipe = self.recipe.model_dump(mode="json")
        return {
            "cache_fingerprint": self.cache_fingerprint,
            "mixed_fingerprints": list(self.mixed_fingerprints),
            "alignments": list(self.alignments),
            "teachers": self.teachers,
            "order": self.order,
            "held_out": self.held_out,
            "student_weights": self.student_weights,
            "deepspeed": self.deepspeed,
            "recipe": recipe,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], *, origin: str) -> RunIdentity:
        """Inverse of `to_json`; settings that are newer than the file get their defaults."""
        recipe = parse_recipe(data["recipe"], origin=origin)
        return cls(
            recipe,
            cache_fingerprint=data["cache_fingerprint"],
            student_weights=data.get("student_weights", {}),
            deepspeed=data["deepspeed"],
            mixed_fingerprints=tuple(data.get("mixed_fingerprints", ())),
            alignments=tuple(data.get("alignments", ())),
            teachers=data.get("teachers"),
            order=data.get("order", 1),
            held_out=data.get("held_out"),
        )


class RunFolder:
    """A run on disk. Only the main process may call what writes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def student(self) -> Path:
        """The exported student."""
        return self.path / "student"

    def summary(self) -> dict[str, Any] | None:
        """Reads the finished run's summary; None while it is unfinished or its student was deleted."""
        path = self.path / "summary.json"
        if not path.is_file() or not (self.student / "config.json").is_file():
            return None
        try:
            content = json.loads(path.read_bytes())
        except ValueError:  # damaged: the run is exported once more, which writes it again
            return None
        return content if isinstance(content, dict) and "steps" in content else None

    def finish(self, summary: dict[str, Any]) -> None:
        """Declare the run finished."""
        _write(self.path / "summary.json", summary)

    def cache_fingerprints(self) -> tuple[str, ...]:
        """The fingerprints of the caches that a run which has begun reads, in the order of its recipe. None before its first
        checkpoint, until when its settings may change, or where run.json does not tell."""
        if not any(self.path.glob("checkpoint-*")) and self.summary() is None:
            return ()
        try:
            before = json.loads(read_regular(self.path, "run.json", most=MOST_MANIFEST_BYTES))
            return (str(before["cache_fingerprint"]), *map(str, before.get("mixed_fingerprints", ())))
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            CacheError,
            CacheDamaged,
        ):  # see `check_identity`
            return ()

    def check_identity(self, identity: RunIdentity) -> None:
        """Raise `RecipeError` when the folder holds another run than the one that is asked for.

        Before its first checkpoint a run holds nothing that could be lost, and its settings may change.
        """
        if not any(self.path.glob("checkpoint-*")) and self.summary() is None:
            return
        remedy = f"use another train.output, or delete {self.path}"
        path = self.path / "run.json"
        if not path.is_file():
            raise RecipeError(f"{self.path} holds checkpoints of something else (it has no run.json); {remedy}")
        try:
            before = RunIdentity.from_json(json.loads(path.read_bytes()), origin=str(path))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise RecipeError(
                f"{path} is damaged: nothing says with which settings {self.path} was begun; restore it from a backup, or "
                f"{remedy}"
            ) from None
        differing = list(differences(before.decisive(), identity.decisive()))
        if differing:
            shown = "; ".join(f"{one.key} was {_short(one.left)}, now {_short(one.right)}" for one in differing[:4])
            raise RecipeError(f"{self.path} holds a run with other settings ({shown}); {remedy}")

    def claim(self, identity: RunIdentity) -> None:
        """Write down whose run this is."""
        self.path.mkdir(parents=True, exist_ok=True)
        _write(self.path / "run.json", identity.to_json())

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second job out while this one writes, also one whose launcher was killed and which still runs.

        The lock belongs to this process alone and ends with it, however it ends. Raises `JobFailed` where it is taken.
        """
        with locked(self.path / ".lock", job="training job", folder=self.path):
            yield

    def newest_checkpoint(self) -> Checkpoint | None:
        """The newest whole checkpoint; its bytes are not checked."""
        return next(reversed(complete_checkpoints(self.path)), None)


def _short(value: Any) -> str:
    text = "absent" if value is ABSENT else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "…"


def _write(path: Path, data: dict[str, Any]) -> None:
    write_whole(path, json.dumps(data, indent=1) + "\n")
