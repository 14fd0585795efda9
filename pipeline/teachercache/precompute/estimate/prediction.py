"""From what was measured on a sample to bytes, hours and break-even of the whole job."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from teachercache.config import Recipe
from teachercache.precompute.estimate.break_even import RunTimes
from teachercache.precompute.estimate.devices import Device
from teachercache.precompute.estimate.measured import Cost
from teachercache.precompute.estimate.sample import TimedSample

# Stated, not measured: Ray's own processes, and one that imports torch and transformers where this one had them already
# (tests/bench/estimate_against_job.py shows the processes of a job).
RAY_START = Cost(seconds=9.0, processor=15.0)
PROCESS_START = Cost(seconds=4.0, processor=4.0)
TOKENISERS = 4  # processes that Ray Data starts for tokenising, where there are as many units
NOTHING = Cost()


@dataclass(frozen=True)
class OnDevices:
    """The prediction that a roofline gives for N devices of a kind."""

    hours: float
    position_seconds: float  # of the forward pass, on one
    times: RunTimes


class Prediction:
    """Figures of the whole job, by the recipe and what was timed of it."""

    def __init__(self, recipe: Recipe, timed: TimedSample, *, importing: Cost = NOTHING) -> None:
        """`importing`: what libraries took that every process of the job imports; nothing where they were there before."""
        self._recipe, self._timed = recipe, timed
        self._process = max(PROCESS_START, importing, key=lambda cost: cost.processor)
        self.corpus = timed.counts.corpus

    @property
    def bytes_by_part(self) -> dict[str, int]:
        """Bytes of all files of the cache, alignments among them: targets, tokens and text, headers, what they are read by."""
        parts: Counter[str] = Counter()
        for sizes in self._timed.sizes:
            parts.update(sizes.of(self.corpus, sample=self._timed.captured, units=self._timed.counts.units))
        return dict(parts)

    def stages(self, *, actors: int) -> dict[str, Cost]:
        """Costs of the job's stages on this machine, one after the other."""
        fixed = self._before_the_work()
        work = self._cost("capturing") * self._times
        tokenising = self._cost("tokenising") * self._timed.counts.factor
        tokenising += self._process * min(TOKENISERS, self._timed.counts.units)
        shared = Cost(0.0 if self._timed.placement.gpus else tokenising.processor / self._cores, tokenising.processor)
        return {
            **fixed,
            "tokenising, beside the teacher": shared,
            "teacher, encoding, writing": Cost(work.seconds / actors, work.processor),
            **self._alignments(),
        }

    @property
    def _times(self) -> float:
        return self.corpus.positions / self._timed.captured.positions

    @property
    def _cores(self) -> int:
        return self._timed.placement.threads or self._timed.cores

    def _cost(self, stage: str) -> Cost:
        return self._timed.costs.get(stage, NOTHING)

    def _before_the_work(self) -> dict[str, Cost]:
        timed = self._timed
        loads = 1 + (timed.fitted > 0)  # calibration has a process of its own
        fit = timed.to_fit / timed.fitted if timed.fitted else 0.0
        return {
            "reading the corpus": self._cost("planning") + self._cost("counting") * (timed.counts.factor - 1),
            "starting Ray": RAY_START + self._process * (loads + timed.placement.actors - 1),
            "loading the teacher": self._cost("loading") * loads,
            "calibrating": self._cost("checking input") + self._cost("calibrating") * fit,
        }

    def _alignments(self) -> dict[str, Cost]:
        if not self._recipe.align:
            return {}
        started = (RAY_START + self._process) * len(self._recipe.align)
        work = self._cost("aligning") * self._times
        parallel = Cost(work.seconds / min(self._timed.cores, self._timed.counts.units), work.processor)
        return {"aligning": started + self._cost("planning alignments") + parallel}

    @property
    def times(self) -> RunTimes:
        """Cache against live teacher on this machine, in time of one actor."""
        online, reading = self._cost("online").seconds, self._cost("reading").seconds
        return RunTimes(
            cache_seconds=total(self.stages(actors=1)).seconds,
            online_seconds=self.student_positions * online / self._timed.online_positions,
            reading_seconds=self.student_positions * reading / self._timed.read_positions,
        )

    @property
    def student_positions(self) -> float:
        """Positions that one student run reads, over all of its epochs."""
        train = self._recipe.train
        once = self.corpus.positions - self.corpus.held_out_positions
        if train is None:
            return once
        if train.max_steps is not None:
            return train.max_steps * train.global_batch * self.corpus.positions / self.corpus.rows
        return train.epochs * once

    def on(self, device: Device, *, count: int) -> OnDevices:
        """The job on so many of a device, by a roofline; writing takes a CPU as long as here."""
        timed, size = self._timed, self._recipe.precompute.positions_per_batch
        seconds = device.position_seconds(
            operations=timed.operations, parameters=timed.teacher["parameters"], positions_per_batch=size
        )
        before = {name: cost for name, cost in self._before_the_work().items() if name != "calibrating"}
        serial = total(before).seconds + timed.to_fit * seconds
        work = self.corpus.positions * (seconds + timed.writing_seconds / timed.captured.positions)
        aligning = total(self._alignments()).seconds
        times = RunTimes(
            cache_seconds=serial + work + aligning,
            online_seconds=self.student_positions * seconds,
            reading_seconds=self.student_positions * device.seconds(timed.tail_operations),
        )
        return OnDevices((serial + work / count + aligning) / 3600, seconds, times)


def total(stages: Mapping[str, Cost]) -> Cost:
    """The sum of stages."""
    return sum(stages.values(), NOTHING)
