"""The estimate, from a recipe to the document that `--json` prints. Heavy libraries load after its first line."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from teachercache.config import Recipe
from teachercache.errors import RecipeError
from teachercache.precompute.estimate.devices import DEVICES, SHARE_OF_PEAK, device_named
from teachercache.precompute.estimate.measured import Stopwatch

if TYPE_CHECKING:
    from teachercache.corpus.sample import CorpusSample
    from teachercache.precompute.estimate.break_even import RunTimes
    from teachercache.precompute.estimate.prediction import Prediction
    from teachercache.precompute.estimate.sample import TimedSample

PRICE = 0.023  # a GB and month of an object store's standard class, in dollars, as several list it in 2026


@dataclass(frozen=True)
class Question:
    """The options beside the recipe. Raises `RecipeError` for a device that is not in the table, and for a number of devices
    without their kind."""

    seconds: float = 30.0
    device: str | None = None
    devices: int | None = None
    price_per_gb_month: float = PRICE
    student_runs: int | None = None
    teacher_changes: int = 0

    def __post_init__(self) -> None:
        if self.device is not None:
            device_named(self.device)
        elif self.devices is not None:
            raise RecipeError("--devices says how many; add --device KIND to say of which kind, e.g. --device H100")


def run_estimate(recipe: Recipe, question: Question, *, console: Console) -> dict[str, Any]:
    """Estimate a recipe's precompute job from a sample of its rows; nothing is written but in a temporary folder.

    Raises the `UserError`s that the job itself would raise before its work.
    """
    recipe.require("teacher", "corpus")
    assert recipe.corpus is not None

    def tell(message: str) -> None:
        console.print(message, markup=False, highlight=False, soft_wrap=True)

    tell(f"reading a sample of {recipe.corpus.source} …")
    watch = Stopwatch()
    with watch.of("importing"):
        from teachercache.corpus.sample import sample_corpus
        from teachercache.precompute.estimate.prediction import Prediction
        from teachercache.precompute.estimate.sample import SampleRun

    sample = sample_corpus(recipe.corpus)
    with tempfile.TemporaryDirectory(prefix="teachercache-estimate-") as folder:
        timed = SampleRun(recipe, sample, Path(folder), seconds=question.seconds, tell=tell).result()
    return document(recipe, question, sample, timed, Prediction(recipe, timed, importing=watch.costs["importing"]))


def document(
    recipe: Recipe, question: Question, sample: CorpusSample, timed: TimedSample, prediction: Prediction
) -> dict[str, Any]:
    """The document that `--json` prints."""
    parts, stages = prediction.bytes_by_part, prediction.stages(actors=timed.placement.actors)
    size, seconds = sum(parts.values()), sum(cost.seconds for cost in stages.values())
    return {
        "teacher": {"model": recipe.teacher.model if recipe.teacher else "", **_teacher(timed)},
        **_counted(sample, timed),
        "bytes": size,
        "bytes_by_part": parts,
        "bytes_per_position": round(size / prediction.corpus.positions, 2),
        "price_per_gb_month": question.price_per_gb_month,
        "cost_per_month": round(size / 1e9 * question.price_per_gb_month, 4),
        "device": timed.device,
        "actors": timed.placement.actors,
        "hours": seconds / 3600,
        "processor_hours": sum(cost.processor for cost in stages.values()) / 3600,
        "seconds_by_stage": {name: round(cost.seconds, 2) for name, cost in stages.items()},
        "student_positions": round(prediction.student_positions),
        **_break_even(prediction.times, question),
        "on_devices": _on_devices(prediction, question, timed),
    }


def _teacher(timed: TimedSample) -> Mapping[str, Any]:
    return {name: timed.teacher[name] for name in ("architecture", "parameters", "dtype")}


def _counted(sample: CorpusSample, timed: TimedSample) -> dict[str, Any]:
    counts, corpus = timed.counts, timed.counts.corpus
    return {
        "documents": round(counts.documents),
        "quarantined": round(counts.quarantined),
        "rows": round(corpus.rows),
        "positions": round(corpus.positions),
        "held_out_positions": round(corpus.held_out_positions),
        "tokens": round(corpus.tokens),
        "units": counts.units,
        "counted_by": sample.counted_by,
        "sampling_error": round(counts.error, 4),
        "sample": {
            "rows": round(timed.captured.rows),
            "positions": round(timed.captured.positions),
            "calibration_positions": timed.fitted,
        },
    }


def _break_even(times: RunTimes, question: Question) -> dict[str, Any]:
    changes, runs = question.teacher_changes, question.student_runs
    found: dict[str, Any] = {
        "teacher_changes": changes,
        "online_hours_per_run": times.online_seconds / 3600,
        "reading_hours_per_run": times.reading_seconds / 3600,
        "break_even_runs": times.break_even_runs(teacher_changes=changes),
    }
    if runs is not None:
        hours = {"cache": times.from_cache(runs, teacher_changes=changes), "online": times.online(runs)}
        found |= {"student_runs": runs, "hours_of_runs": {name: value / 3600 for name, value in hours.items()}}
    return found


def _on_devices(prediction: Prediction, question: Question, timed: TimedSample) -> dict[str, Any] | None:
    if question.device is None:
        return None
    name, count = device_named(question.device), question.devices or 1
    device = DEVICES[name]
    asked_for = {"device": name, "devices": count, "share_of_peak": SHARE_OF_PEAK}
    if not device.holds(timed.teacher["parameters"]):
        return {**asked_for, "fits": False, "hours": None, "break_even_runs": None}
    figures = prediction.on(device, count=count)
    return {
        **asked_for,
        "fits": True,
        "hours": figures.hours,
        "microseconds_per_position": round(figures.position_seconds * 1e6, 3),
        "break_even_runs": figures.times.break_even_runs(teacher_changes=question.teacher_changes),
    }
