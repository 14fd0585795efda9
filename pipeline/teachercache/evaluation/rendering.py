"""The comparison table for people, within 100 columns."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table as RichTable

from teachercache.evaluation.table import Table

PERPLEXITY, BITS_PER_BYTE = "perple-\nxity", "bits\n/byte"
LABELS = {"student_cross_entropy": "student, cross-\nentropy only"}
COLUMNS = (
    "loss\nnats",
    PERPLEXITY,
    "top-1\nagrees",
    "accu-\nracy",
    "quality\nkept",
    "latency\nms",
    "speed-\nup",
    "tokens\n/s",
    "memory\nMB",
    "para-\nms",
)


def render(table: Table) -> RichTable:
    """One line a model; the caption says what was measured and how."""
    rendered = RichTable(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
        caption=_caption(table),
        caption_justify="left",
    )
    rendered.add_column("", no_wrap=True)
    # Losses and perplexities of different tokens do not compare.
    across = len({row.get("tokenizer") for row in table.values()}) > 1
    for column in COLUMNS:
        shown = BITS_PER_BYTE if across and column == PERPLEXITY else column
        rendered.add_column(shown, justify="right", no_wrap=True)
    for role, row in table.items():
        rendered.add_row(LABELS.get(role, role.replace("_", " ")), *_cells(row, across=across))
    return rendered


def _cells(row: dict[str, Any], *, across: bool) -> list[str]:
    kept, faster = row.get("quality_kept"), row.get("speed_up")
    return [
        f"{row['loss']:.3f}",
        _bits(row["bits_per_byte"]) if across else _perplexity(row["perplexity"]),
        f"{row['top1_agreement']:.1%}",
        f"{row['accuracy']:.1%}",
        "–" if kept is None else f"{kept:.1%}",
        f"{row['latency_ms']:.3g}",
        "–" if faster is None else f"{faster:.2f}×",
        f"{row['throughput']:,.0f}",
        f"{row['memory_mb']:,.0f}",
        _count(row["parameters"]),
    ]


def _bits(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _perplexity(value: float) -> str:
    if value < 1000:
        return f"{value:.2f}"
    return f"{value:,.0f}" if value < 10**6 else f"{value:.0e}"


def _count(parameters: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if parameters >= size:
            return f"{parameters / size:.3g}{unit}"
    return str(parameters)


def _caption(table: Table) -> str:
    row = table["teacher"]
    place = f"{row['device']}, {row['threads']} threads" if row["device"] == "cpu" else row["device"]
    on_cpu = row["memory_is"] == "resident set"
    memory = "resident memory that the loaded weights add" if on_cpu else "most GPU memory in a pass at batch 1"
    return (
        f"{row['positions']:,} held-out positions in {row['rows']:,} rows. quality kept: accuracy over the teacher's.\n"
        f"latency: one forward pass of {row['latency_tokens']} tokens, batch 1; tokens/s at batch "
        f"{row['throughput_batch']} ({place}).\nmemory: {memory}."
        + (
            "\nstudent before: as training began; a cut of the teacher's layers predicts nothing yet."
            * ("student_before" in table)
        )
    )
