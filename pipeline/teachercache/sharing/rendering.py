"""Tables of lists and comparisons, from the documents that `--json` prints."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from teachercache.nested import shortened

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
STEP = 1000


def caches_table(result: dict[str, Any]) -> RenderableType:
    """A line for each cache; below them, those that cannot be read."""
    whole = [found for found in result["caches"] if "problem" not in found]
    table = Table()
    for name in ("cache", "teacher, corpus", "targets, at T"):
        table.add_column(name, overflow="fold")
    for name in ("rows", "positions", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("settings", no_wrap=True)
    for found in whole:
        temperatures = found["temperatures"]
        at = ", ".join(f"{T:g}" for T in temperatures) if isinstance(temperatures, list) else temperatures or "–"
        table.add_row(
            Text(found["name"]),
            Text(f"{found['teacher']}\n{found['corpus']}"),
            Text(f"{', '.join(found['targets'].values())}\n{at}"),
            f"{found['rows']:,}",
            f"{found['positions']:,}",
            size(found["bytes"]),
            (found["settings_fingerprint"] or found["fingerprint"])[:8],
        )
    problems = [
        Text.assemble((found["name"], "red"), f": {found['problem']}")
        for found in result["caches"]
        if "problem" in found
    ]
    if not whole and not problems:
        return Text("no cache there")
    return Group(*([table] if whole else []), *problems)


def comparison_table(result: dict[str, Any]) -> RenderableType:
    """A line for each key that differs, and how many rows both have."""
    lines: list[RenderableType] = []
    if result["equal"]:
        lines.append(Text(f"the two {result['kind']}s do not differ"))
    else:
        table = Table()
        for head in (Text("key"), Text(result["left"]), Text(result["right"])):
            table.add_column(head, overflow="fold")
        for item in result["differences"]:
            table.add_row(Text(item["key"]), *(_value(item[side]) for side in ("left", "right")))
        lines.append(table)
    for split, counts in result.get("rows", {}).items():
        told = f"{counts['both']:,} in both, {counts['left_only']:,} and {counts['right_only']:,} in one of them alone"
        lines.append(Text(f"{split} rows: {told}"))
    return Group(*lines)


def size(count: int) -> str:
    """A number of bytes, to three digits."""
    value, unit = float(count), 0
    while value >= STEP and unit < len(UNITS) - 1:
        value, unit = value / STEP, unit + 1
    return f"{value:.3g} {UNITS[unit]}" if unit else f"{count} {UNITS[0]}"


def _value(value: Any) -> Text:
    return Text("–" if value is None else value if isinstance(value, str) else shortened(value))
