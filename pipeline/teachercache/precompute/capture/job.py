"""The precompute job from a recipe to a committed cache."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from teachercache.cache import Manifest
from teachercache.cache.manifest.manifest import MANIFEST, manifest_in
from teachercache.cache.stores.choice import store_at
from teachercache.cache.stores.lease import leased
from teachercache.cache.stores.store import Store, holds, place
from teachercache.config import Recipe, TeacherConfig, is_url
from teachercache.errors import JobFailed, RecipeError
from teachercache.files import full_disk_in_a_line
from teachercache.models.loading import load_tokenizer
from teachercache.precompute.capture.commit import DRIFT_AT, commit, remove_work
from teachercache.precompute.capture.given_calibration import check_calibration, take_calibration
from teachercache.precompute.capture.input_form import input_warning
from teachercache.precompute.capture.plan import Plan, make_plan, remember
from teachercache.precompute.engine.event_log import EventLog, log_file
from teachercache.precompute.engine.placement import placed
from teachercache.precompute.engine.progress import ProgressDisplay
from teachercache.precompute.engine.termination import ending_in_a_line
from teachercache.precompute.engine.timing import Timing, rounded
from teachercache.precompute.planning.each import in_turn
from teachercache.tokens.fingerprint import require_fast, tokenizer_fingerprint
from teachercache.version import __version__

if TYPE_CHECKING:
    from teachercache.precompute.capture.job_facts import Job


def run_precompute(
    recipe: Recipe, *, console: Console, recheck_corpus: bool = False, recheck: bool = False
) -> dict[str, Any]:
    """Run the job, or what is left of it; returns the summary that `--json` prints.

    Running it again when it is finished changes nothing. A corpus that looks as it did when the job began (names, sizes and
    times of its files) is read again with `recheck_corpus` alone. Where a job goes on, the bytes of some finished units are
    checked, with `recheck` of all; a unit whose files have changed is computed again. Raises `UserError` before compute is
    spent, `JobFailed` when it could not be completed; finished units are kept either way.
    """
    start = time.perf_counter()
    source = recipe.corpus.source if recipe.corpus else ""
    console.print(f"planning: reading {source} …", markup=False)
    _check_paths(recipe)
    _check_backend(recipe)
    _check_students(recipe)
    log, tell = EventLog(log_file(recipe.cache)), partial(console.print, markup=False)
    with (
        ending_in_a_line(),
        full_disk_in_a_line(recipe.cache),
        leased(store_at(recipe.cache), job="precompute job", tell=tell) as store,
    ):
        log.write("started", cache=recipe.cache, corpus=source, version=__version__)
        try:
            result = _run_leased(recipe, store, console, log, start, recheck_corpus=recheck_corpus, recheck=recheck)
        except BaseException as error:
            log.write("failed", error=f"{type(error).__name__}: {error}", seconds=round(time.perf_counter() - start, 3))
            raise
        log.write("finished", **result)
    return aligned(recipe, result, console=console)


def aligned(recipe: Recipe, result: dict[str, Any], *, console: Console) -> dict[str, Any]:
    """A job's result with those of the alignments that the recipe asks for, which are made now."""
    if recipe.align:
        from teachercache.precompute.align.job import run_align

        address = recipe.precompute.address
        result["alignments"] = [
            run_align(recipe.cache, student=student, address=address, console=console) for student in recipe.align
        ]
    return result


def _check_students(recipe: Recipe) -> None:
    """Before the teacher runs for hours: tokenizers that cannot be used, and text that would be missing."""
    if not recipe.align or recipe.corpus is None or recipe.teacher is None:
        return
    from teachercache.precompute.align.plan import check_tokenizer

    if not recipe.corpus.store_text:
        raise RecipeError("align needs the text of the corpus; set corpus.store_text: true, or leave align out")
    teacher = recipe.teacher
    tokenizer = load_tokenizer(teacher.model, revision=teacher.revision, trust_remote_code=teacher.trust_remote_code)
    for student in recipe.align:
        check_tokenizer(
            require_fast(load_tokenizer(student)),
            student,
            teacher_fingerprint=tokenizer_fingerprint(tokenizer),
            chats=recipe.corpus.messages_field is not None,
        )


def _check_backend(recipe: Recipe) -> None:
    """Before anything is staged. The default, whose modules take seconds to import here, is there."""
    if recipe.teacher is not None and recipe.teacher.backend != TeacherConfig.model_fields["backend"].default:
        from teachercache.teacher.backends import backend_named

        backend_named(recipe.teacher.backend)


def _check_paths(recipe: Recipe) -> None:
    """On a cluster, a relative path means another place in every process (a submitted job runs in a copy of the sources)."""
    is_shared = is_url(recipe.cache) or Path(recipe.cache).is_absolute()
    if (recipe.precompute.address or os.environ.get("RAY_ADDRESS")) and not is_shared:
        raise RecipeError(
            f"cache: {recipe.cache} is a relative path, which nodes of a cluster do not share; "
            f"set it to a folder that all of them see, e.g. -s cache=/shared/{Path(recipe.cache).name}"
        )


def _run_leased(
    recipe: Recipe, store: Store, console: Console, log: EventLog, start: float, *, recheck_corpus: bool, recheck: bool
) -> dict[str, Any]:
    with contextlib.ExitStack() as cluster:
        each = partial(_on_each, recipe, console, cluster)
        plan = make_plan(recipe, store=store, each=each, recheck=recheck_corpus)
        return _run_planned(recipe, plan, console, log, start, recheck=recheck)


def _on_each(
    recipe: Recipe, console: Console, cluster: contextlib.ExitStack, work: Callable[[Any], Any], items: Sequence[Any]
) -> Iterator[Any]:
    """`Each`: on the cluster, which is started for more than one item."""
    if len(items) < 2:
        return in_turn(work, items)
    from teachercache.precompute.engine.cluster import connected, on_cluster

    console.print(f"starting Ray: the corpus is read in {len(items)} parts …")
    cluster.enter_context(connected(recipe.precompute))
    return on_cluster(work, items)


def _run_planned(
    recipe: Recipe, plan: Plan, console: Console, log: EventLog, start: float, *, recheck: bool
) -> dict[str, Any]:
    if plan.mended:
        console.print(plan.mended, markup=False, soft_wrap=True)
    given = recipe.targets.calibration_from
    if holds(plan.store, MANIFEST):
        manifest = manifest_in(plan.store)
        if given is not None:
            check_calibration(manifest, given, name=plan.store.name)
        console.print(f"{plan.store.name} is complete: nothing to do", markup=False)
        remove_work(plan.store)  # of a job that was killed between its last two steps
        return summary(recipe, manifest, Timing(), seconds=time.perf_counter() - start)
    if given is not None:
        take_calibration(plan, given)
        console.print(f"calibration: that of {given}", markup=False)
    for file in plan.records().recheck(every=recheck):
        told = f"{place(plan.store, file)} has other bytes than were written: its unit is computed again"
        console.print(told, markup=False, soft_wrap=True)
        log.write("damaged", file=file)
    pending = plan.pending()
    if len(pending) < plan.units:
        console.print(f"resuming: {plan.units - len(pending)} of {plan.units} units are done")
    log.write("planned", units=plan.units, pending=len(pending), seconds=round(time.perf_counter() - start, 3))
    timing = _run(recipe, plan, pending, console, log)
    if timing.given_up:
        raise JobFailed(
            f"{len(timing.given_up)} of {plan.units} units have no result, all others are done; run the same command again to "
            f"try these once more; {timing.given_up[0]}"
        )
    manifest = commit(plan)
    remember(plan, recipe.cache)
    result = summary(recipe, manifest, timing, seconds=time.perf_counter() - start)
    print_closing(console, result, manifest)
    return result


def _run(recipe: Recipe, plan: Plan, pending: list[int], console: Console, log: EventLog) -> Timing:
    timing = Timing()
    if not pending:
        return timing
    console.print("starting Ray and loading the teacher …")
    from teachercache.precompute.capture.job_facts import Job
    from teachercache.precompute.engine.cluster import cluster_nodes, connected

    began = time.time()
    with connected(recipe.precompute):
        placement = placed(recipe.precompute, cluster_nodes(), units=len(pending))
        console.print(placement.describe(), highlight=False)
        log.write("placed", actors=placement.actors, gpus=placement.gpus, cpus=placement.cpus)
        timing.actors = min(placement.actors, len(pending))
        job = Job.of(recipe, plan, placement)
        if plan.calibration() is None:
            _calibrate(job, plan, console, log)
            began = time.time()
        first = _compute(job, plan, pending, timing, console, log)
    timing.start_up_seconds = first - began
    return timing


def _calibrate(job: Job, plan: Plan, console: Console, log: EventLog) -> None:
    from teachercache.precompute.capture.stages import run_calibration

    console.print("calibrating: fitting what targets are read by to a sample of the corpus …")
    began = time.perf_counter()
    run_calibration(job)
    record = plan.calibration()
    assert record is not None
    console.print(
        f"fitted to {record['positions']:,} positions of {len(record['sources'])} documents"
        + _describe_choice(record.get("chosen"))
    )
    log.write("calibrated", positions=record["positions"], seconds=round(time.perf_counter() - began, 3))


def _compute(job: Job, plan: Plan, pending: list[int], timing: Timing, console: Console, log: EventLog) -> float:
    """Runs the pending units, and shows and logs what they make; returns when the first one began, by the wall clock."""
    from teachercache.precompute.capture.stages import run_units
    from teachercache.precompute.capture.supervisor import GivenUp
    from teachercache.precompute.engine.metrics import JobMetrics

    first, told = math.inf, _tell_input(plan, console)
    timing.pending, timing.documents = len(pending), plan.rows_in * len(pending) / plan.units
    display, metrics = ProgressDisplay(console, timing), JobMetrics(plan.store.name)
    with display.shown():
        for done, before in run_units(job, pending):
            told = told or _tell_input(plan, console)
            if isinstance(done, GivenUp):
                timing.given_up.append(f"unit {done.unit}: {done.reason}")
                log.write("given_up", unit=done.unit, reason=done.reason)
                console.print(f"warning: unit {done.unit} has no result: {done.reason}", markup=False, soft_wrap=True)
                continue
            first = min(first, done.started)
            timing.working_seconds = time.time() - first
            timing.batches_halved += done.batches_halved
            seconds = {**before, **done.stage_seconds}
            timing.add(
                documents=done.documents, rows=done.rows, positions=done.positions, size=done.bytes, stage_seconds=seconds
            )  # fmt: skip
            log.write("unit", **{**vars(done), "stage_seconds": rounded(seconds)})
            metrics.set(rate=timing.rate, seconds_left=timing.seconds_left)
            display.update()
    return first


def _tell_input(plan: Plan, console: Console) -> bool:
    """Warns where another beginning of rows suits the teacher better; returns whether that was measured by now."""
    measured = plan.input_form()
    line = input_warning(measured)
    if line is not None:
        console.print(line, markup=False, soft_wrap=True)
    return bool(measured)


def _describe_choice(chosen: dict[str, Any] | None) -> str:
    if chosen is None:
        return ""
    left = f"{chosen['kl']:.3g} nats, about {chosen['sketch_bytes']:.0f} bytes a position"
    return f"; for target_kl {chosen['target_kl']:g}: rank {chosen['rank']}, step {chosen['step']:g} ({left})"


def summary(recipe: Recipe, manifest: Manifest, timing: Timing, *, seconds: float) -> dict[str, Any]:
    """Sums up the job's result; `positions_per_second` leaves start-up out."""
    working = timing.working_seconds
    return {
        "cache": str(recipe.cache),
        "rows": manifest.rows,
        "positions": manifest.positions,
        "quarantined": manifest.audit.quarantined,
        "windows_quarantined": manifest.audit.windows_quarantined,
        "audit": vars(manifest.audit),
        "bytes": manifest.shard_bytes,
        "bytes_per_position": manifest.bytes_per_position(),
        "rows_computed": timing.rows,
        "positions_computed": timing.positions,
        "bytes_computed": timing.bytes,
        "positions_per_second": round(timing.positions / working, 1) if working else 0.0,
        "teacher_seconds": round(timing.stage_seconds["forward"], 2),
        "stage_seconds": rounded(timing.stage_seconds),
        "utilisation": timing.utilisation(),
        "start_up_seconds": round(timing.start_up_seconds, 2),
        "batches_halved": timing.batches_halved,
        "input_form": manifest.input_form,
        "seconds": round(seconds, 2),
        "fingerprint": manifest.fingerprint,
    }


def print_closing(console: Console, result: dict[str, Any], manifest: Manifest) -> None:
    """Print what the job made, and warnings of what it found: nothing held out, units that drift, batches halved."""
    size = result["bytes_per_position"]
    held_out = manifest.held_out_rows
    lost = "".join(
        f", {result[name]:,} {what} quarantined"
        for name, what in (("quarantined", "rows of the corpus"), ("windows_quarantined", "windows of other rows"))
        if result[name]
    )
    console.print(
        f"cached {result['rows'] - held_out:,} rows to train on and {held_out:,} held-out ones, {result['positions']:,} "
        f"positions{lost}, {size['logits']:.0f} bytes per position for logits ({size['total']:.0f} in all), "
        f"{result['positions_per_second']:,.0f} positions/s → {result['cache']}",
        markup=False,
    )
    if result["utilisation"]:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in result["utilisation"].items())
        console.print(f"of the teacher's time: {shares} (reading and tokenising run beside it)", markup=False)
    if held_out in (0, result["rows"]):
        missing = "no row is held out: there will be no evaluation" if not held_out else "all rows are held out"
        console.print(f"warning: {missing}; change corpus.held_out, or use a larger corpus", markup=False)
    for line in _drift_warnings(manifest):
        console.print(f"warning: {line}", markup=False)
    if result["batches_halved"]:
        console.print(
            f"warning: {result['batches_halved']} batches ran out of memory and were halved; "
            "lower precompute.positions_per_batch to spare these attempts",
            markup=False,
        )


def _drift_warnings(manifest: Manifest) -> list[str]:
    drifting = manifest.fidelity.get("drifting_units", [])
    if not drifting:
        return []
    worst = max(drifting, key=lambda entry: entry["kl"])
    mean = manifest.fidelity["kl"][DRIFT_AT]
    return [
        f"the sketch fits {len(drifting)} of {len(manifest.shards)} units less than the rest (KL at T={DRIFT_AT} up to "
        f"{worst['kl']:.2f} nats in unit {worst['unit']}, {mean:.2f} on average): their text differs from the calibration "
        "sample; raise targets.logits.calibration_positions, or cache that text apart"
    ]
