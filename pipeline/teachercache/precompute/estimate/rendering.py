"""The table of an estimate, within 80 columns. It takes the document that `--json` prints."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text


def estimate_table(result: dict[str, Any]) -> Table:
    """A table of what the job takes and when it pays; the caption says what is measured and what is taken for granted."""
    table = Table(show_header=False, box=box.SIMPLE, padding=(0, 1), pad_edge=False, caption_justify="left", width=80)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in (*_corpus(result), *_bytes(result), *_hours(result), *_pays(result)):
        table.add_row(Text(name), Text(value))
    table.caption = Text(_caption(result))
    return table


def _corpus(result: dict[str, Any]) -> list[tuple[str, str]]:
    teacher = result["teacher"]
    lost = f", {result['quarantined']:,} unusable" if result["quarantined"] else ""
    return [
        ("teacher", f"{teacher['model']} ({teacher['parameters']:,} parameters, {teacher['dtype']})"),
        ("corpus", f"{result['documents']:,} documents{lost} → {result['rows']:,} rows, counted by {result['counted_by']}"),
        ("positions", f"{result['positions']:,}{_error(result)} in {result['units']:,} shards"),
    ]  # fmt: skip


def _error(result: dict[str, Any]) -> str:
    return f" ± {result['sampling_error']:.1%} (standard error)" if result["sampling_error"] else ""


def _bytes(result: dict[str, Any]) -> list[tuple[str, str]]:
    listed = ", ".join(f"{part} {bytes_of(size)}" for part, size in result["bytes_by_part"].items())
    price = f"${result['cost_per_month']:,.2f} a month at ${result['price_per_gb_month']:g} per GB"
    return [
        ("bytes", f"{bytes_of(result['bytes'])}, {result['bytes_per_position']:.0f} a position"),
        ("  of these", listed),
        ("store", price),
    ]


def _hours(result: dict[str, Any]) -> list[tuple[str, str]]:
    actors = f"{result['actors']} actor{'s' if result['actors'] > 1 else ''}"
    stages = ", ".join(f"{name} {time_of(seconds)}" for name, seconds in result["seconds_by_stage"].items())
    rows = [
        ("time here", f"{time_of(3600 * result['hours'])} with {actors} on {result['device']}"),
        ("  of these", stages),
    ]
    there = result["on_devices"]
    if there is not None:
        where = f"{there['devices']} × {there['device']}"
        told = f"{time_of(3600 * there['hours'])} by a roofline" if there["fits"] else "the teacher does not fit"
        rows.append((where, told))
    return rows


def _pays(result: dict[str, Any]) -> list[tuple[str, str]]:
    changes = result["teacher_changes"]
    made = f"; made {1 + changes} times" if changes else ""
    rows = [("cache pays", f"{_runs(result['break_even_runs'])}{made}")]
    there = result["on_devices"]
    if there is not None and there["fits"]:
        rows.append((f"  on {there['device']}", _runs(there["break_even_runs"])))
    if "student_runs" in result:
        cache, online = (time_of(3600 * result["hours_of_runs"][name]) for name in ("cache", "online"))
        rows.append((f"{result['student_runs']} runs", f"{cache} with the cache, {online} with a live teacher"))
    return rows


def _runs(count: int | None) -> str:
    if count is None:
        return "never: to read it takes as long as a live teacher"
    return "from the first student on" if count == 1 else f"from {count:,} student runs on"


def _caption(result: dict[str, Any]) -> str:
    sample, there = result["sample"], result["on_devices"]
    said = (
        f"Measured on {sample['positions']:,} positions of {sample['rows']:,} rows with the job's own stages; Ray's start is "
        "stated. Times are of this machine as busy as it was."
    )
    if result["sampling_error"]:
        said += " Duplicates in what was not read are counted."
    if there is not None:
        said += (
            f" Roofline: data sheet × {there['share_of_peak']:g}, bf16; nothing was measured on a {there['device']}."
        )
    return said


def bytes_of(size: float) -> str:
    """A size in the unit that suits it."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} bytes"


def time_of(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, factor in (("days", 48 * 3600.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= factor:
            return f"{seconds / (24 * 3600 if unit == 'days' else factor):.3g} {unit}"
    return f"{seconds:.2g} seconds" if seconds < 10 else f"{seconds:.0f} seconds"
