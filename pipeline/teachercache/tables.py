"""Tables that the commands `inspect` and `fidelity` print: of a cache, of its fidelity and of one of its rows.

Each takes the document that `--json` prints.
"""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text


def cache_table(result: dict[str, Any]) -> Table:
    """The table of a cache: what it holds, of whom, and how large it is."""
    table = Table(title=Text(f"cache {result['cache']}", style="table.title"), show_header=False)
    rows, positions, audit = result["rows"], result["positions"], result["audit"]
    sizes = result["bytes_per_position"]
    teacher, corpus = result["teacher"], result["corpus"]
    table.add_row("teacher", Text(f"{teacher['model']}  ({teacher['parameters']:,} parameters, {teacher['dtype']})"))
    table.add_row("corpus", Text(f"{corpus['source']}  (held out: {corpus['held_out']:.0%})"))
    table.add_row("vocabulary", f"{result['tokenizer']['vocabulary_size']:,} tokens")
    table.add_row("sequences", f"{result['sequence']['layout']}, up to {result['sequence']['length']} tokens")
    for name, settings in result["targets"].items():
        table.add_row(f"targets: {name}", Text(", ".join(f"{key} {value}" for key, value in settings.items())))
    table.add_row("rows", f"{rows['train']:,} train, {rows['held-out']:,} held out")
    table.add_row("positions", f"{positions['train']:,} train, {positions['held-out']:,} held out")
    table.add_row("audit", ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in audit.items()))
    table.add_row("size", f"{result['bytes']:,} bytes in {result['shards']} shards")
    table.add_row("bytes/position", ", ".join(f"{key} {value}" for key, value in sizes.items()))
    if result["fidelity"]:
        divergences = ", ".join(f"{value:.4f} at T = {T}" for T, value in result["fidelity"]["kl"].items())
        table.add_row("KL(teacher ‖ stored)", f"{divergences} nats, {result['fidelity']['positions']:,} positions")
    for aligned in result["alignments"]:
        lost = f", {aligned['rows_without_chunks']:,} rows without" if aligned["rows_without_chunks"] else ""
        line = f"{aligned['tokens']:,} tokens, {aligned['chunks']:,} chunks over {aligned['aligned_fraction']:.2%} of the bytes"
        table.add_row("aligned with", Text(f"{aligned['student']}: {line}{lost}"))
    table.add_row("fingerprint", result["fingerprint"])
    return table


LAYER_FIGURES = {
    "hidden_cosine": "hidden states, cosine",
    "hidden_cosine_centred": "less their mean",
    "attention_kl": "attention, KL(teacher ‖ rebuilt)",
}


def fidelity_table(result: dict[str, Any]) -> Table:
    """The table of a cache's fidelity: a line a temperature, and stored layers in the caption."""
    title = f"{result['cache']}: {result['positions']:,} positions of {result['rows']} rows, tail: {result['tail']}"
    table = Table(title=Text(title, style="table.title"))
    for name in ("T", "KL(teacher ‖ stored)", "gradient angle", "5 % cosine", "ECE"):
        table.add_column(name, justify="right")
    for temperature, figures in result["temperatures"].items():
        angle, cosine = figures["gradient_angle_degrees"], figures["gradient_cosine_p05"]
        ece = f"{figures['ece']:.4f}" if "ece" in figures else "–"
        table.add_row(temperature, f"{figures['kl']:.4f}", f"{angle:.2f}°", f"{cosine:.4f}", ece)
    table.caption = (
        f"{result['bytes_per_position']['logits']} bytes a position, {result['basis_bytes']:,} bytes of basis"
    )
    for name, what in LAYER_FIGURES.items():
        if name in result:
            listed = ", ".join(f"{layer}: {value:.5f}" for layer, value in result[name].items())
            table.caption += f"\n{what} by layer: {listed}"
    if "ok" in result:
        verdict = "at no temperature" if result["ok"] else "at some temperature: the cache is not accepted"
        table.caption += f"\nKL above {result['at_most']:g} {verdict}"
    return table


def row_table(result: dict[str, Any]) -> Table:
    """Token by token; with an alignment, chunk by chunk."""
    if "chunks" in result:
        return _chunk_table(result)
    side = "held out" if result["held_out"] else "train"
    table = Table(title=f"row {result['row_id']} ({side}, {result['positions']} positions)")
    for name in ("token", "log p(next)", "tail", "teacher's next tokens at T = 1"):
        table.add_column(name)
    for token in result["tokens"]:
        target = token["target"]
        text = Text(repr(token["text"]))  # chat models' tokens, such as [/INST], look like markup
        if target is None:
            table.add_row(text, "", "", "")
            continue
        top = "  ".join(f"{entry['text']!r} {entry['probability']:.2f}" for entry in target["top"])
        table.add_row(text, f"{target['actual_log_prob']:.2f}", f"{target['tail_mass']:.3f}", Text(top))
    return table


def _chunk_table(result: dict[str, Any]) -> Table:
    """Both tokenisations side by side: a line is a chunk, `≠` marks what only one side has."""
    side = "held out" if result["held_out"] else "train"
    table = Table(title=Text(f"row {result['row_id']} ({side}), teacher and {result['student']}", style="table.title"))
    for name in ("", "teacher's tokens", "student's tokens", "log p", "teacher's next tokens after the chunk"):
        table.add_column(name)
    teacher, student = iter(result["tokens"]), iter(result["student_tokens"])
    before: Any = None  # the target of the token before: what predicts the chunk's first one
    for chunk in result["chunks"]:
        teacher_tokens = [next(teacher) for _ in range(chunk["teacher"])]
        student_tokens = [next(student) for _ in range(chunk["student"])]
        known = [token["target"] for token in [{"target": before}, *teacher_tokens][: len(teacher_tokens)]]
        likely = f"{sum(target['actual_log_prob'] for target in known):.2f}" if known and all(known) else ""
        before = teacher_tokens[-1]["target"] if teacher_tokens else before
        top = "  ".join(f"{entry['text']!r} {entry['probability']:.2f}" for entry in before["top"]) if before else ""
        shown = (Text(" ".join(repr(token["text"]) for token in tokens)) for tokens in (teacher_tokens, student_tokens))
        table.add_row("" if chunk["aligned"] else "≠", *shown, likely, Text(top if teacher_tokens else ""))
    return table
