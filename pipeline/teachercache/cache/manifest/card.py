"""The generated README.md of a cache: what it is, from which teacher and corpus, how big, how to use it."""

from __future__ import annotations

from teachercache.cache.manifest.model import Manifest


def render_card(manifest: Manifest) -> str:
    """Markdown for people who find the folder; made from the manifest alone."""
    audit = manifest.audit
    sizes = manifest.bytes_per_position()
    counts = f"{audit.rows_in:,} rows = {audit.stored:,} stored + {audit.quarantined:,} quarantined"
    table = {
        "teacher": f"`{manifest.teacher['model']}`, {manifest.model['parameters']:,} parameters, {manifest.model['dtype']}",
        "vocabulary": f"{manifest.vocabulary_size:,} tokens",
        "corpus": f"`{manifest.corpus['source']}`: {counts} + {audit.deduplicated:,} deduplicated",
        "sequences": f"{manifest.rows:,} rows of up to {manifest.sequence_length} tokens ({manifest.layout}), "
        f"{manifest.held_out_rows:,} of them held out",
        "positions": f"{manifest.positions:,}",
        "targets": manifest.stored_targets().describe(),
        "size": f"{manifest.shard_bytes:,} bytes of shards; per position {_listed(sizes)}",
        "fingerprint": f"`{manifest.fingerprint}`",
    }
    if manifest.fidelity:
        divergences = ", ".join(f"{value:.3f} at T = {T}" for T, value in manifest.fidelity["kl"].items())
        measured = f"on {manifest.fidelity['positions']:,} positions while capturing"
        table["KL(teacher ‖ stored)"] = f"{divergences} nats ({manifest.fidelity['tail']} tail), measured {measured}"
    rows = "\n".join(f"| {name} | {value} |" for name, value in table.items())
    return f"""# Teacher cache: {manifest.teacher["model"]}

What a teacher says about a corpus, token by token, to distil students from without the teacher.

| | |
|---|---|
{rows}

    teachercache verify .       # every byte against its digest
    teachercache inspect .      # what is inside
    teachercache train RECIPE   # with `cache:` set to this folder

Shards are Arrow IPC files; the plain columns open in DuckDB, Polars and `datasets.load_dataset("arrow", ...)`.
"""


def _listed(sizes: dict[str, float]) -> str:
    return ", ".join(f"{size} {what}" for what, size in sizes.items())
