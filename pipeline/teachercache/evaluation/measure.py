"""Measure one model on the held-out rows of a cache, in this process and nothing else in it.

    python -m teachercache.evaluation.measure --model M --cache C [--rows N] [--batch 8] [--dtype auto] [--device cpu]

prints one JSON object: `model`, `loss` (nats per position), `perplexity`, `bits_per_byte`, `top1_agreement`, `accuracy`,
`latency_ms`, `throughput` (positions/s), `memory_mb`, `parameters`, `positions`, and what they were measured with. A
mistake of the user prints `{"error": {"type", "message"}}` and exits with status 2, another failure that has a remedy with 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teachercache.cache import Cache
from teachercache.cache.alignment import CacheAlignment
from teachercache.config import LOCAL_COPIES, LOCAL_COPIES_BYTES
from teachercache.errors import ModelError, TeachercacheError

if TYPE_CHECKING:
    import torch

    from teachercache.tasks.contract import Task


def measure(
    *,
    model: str,
    cache: str,
    rows: int | None = None,
    batch: int = 8,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    attention: str | None = None,
    trust_remote_code: bool = False,
    local: Path = LOCAL_COPIES,
    local_bytes: int = LOCAL_COPIES_BYTES,
) -> dict[str, Any]:
    """Load `model` and measure it on at most `rows` held-out rows; the keys are those of the module's docstring.

    `batch` (rows) holds for throughput, and is the most in a forward pass over held-out rows. `device`: default, a GPU
    where there is one. `local` and `local_bytes` are those of `Cache.open`. Raises `CacheError`, `ModelError`, `JobFailed`.
    """
    import torch

    from teachercache.evaluation import cost, quality

    opened = Cache.open(cache, local=local, local_bytes=local_bytes)
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    alignment = _alignment(model, opened, source)
    stored = quality.held_out_rows(opened, limit=rows, alignment=alignment)
    _import_code_of(model, source, opened.task)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    meter = cost.MemoryMeter(place)
    loaded = _load(model, place, dtype=dtype, attention=attention, task=opened.task, **source)
    tokens_1L = cost.timed_tokens(max((row.row for row in stored), key=lambda row: row.length))
    return {
        "model": model,
        **meter.read(loaded, tokens_1L),
        **quality.quality(loaded, stored, opened, batch_rows=batch, alignment=alignment),
        "tokenizer": "the teacher's" if alignment is None else alignment.manifest.tokenizer["name"],
        **cost.speed(loaded, tokens_1L, batch_rows=batch),
        "parameters": sum(parameter.numel() for parameter in loaded.parameters()),
        "rows": len(stored),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if place.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }


def _alignment(model: str, cache: Cache, source: dict[str, Any]) -> CacheAlignment | None:
    """The alignment that a model with another tokenizer is measured through: on the cache's own ids it would be scored on
    nonsense. One without a tokenizer is taken at its word."""
    from teachercache.models.loading import load_tokenizer
    from teachercache.stream.alignment import alignment_for

    try:
        tokenizer = load_tokenizer(model, **source)
    except ModelError:
        return None
    return alignment_for(cache, tokenizer, student=model)


def _import_code_of(model: str, source: dict[str, Any], task: Task) -> None:
    """Import the modelling code before memory is metered: it takes megabytes, a tiny student fewer."""
    import torch

    from teachercache.models.loading import auto_class, load_config

    config = load_config(model, **source)
    with contextlib.suppress(ValueError), torch.device("meta"):  # load_causal_lm says what is wrong, in one line
        auto_class(config, task).from_config(config, trust_remote_code=source["trust_remote_code"])


def _load(model: str, device: torch.device, **options: Any) -> Any:
    from teachercache.models.loading import load_causal_lm, takes_one_row

    loaded: Any = load_causal_lm(model, **options)
    if takes_one_row(loaded) and str(loaded.dtype) == "torch.float32":  # flash kernels take half precision alone
        loaded = load_causal_lm(model, **{**options, "attention": None})
    return loaded.to(device)


def main() -> int:
    """Command line: one JSON object on stdout, everything else on stderr."""
    parser = argparse.ArgumentParser(prog="python -m teachercache.evaluation.measure", description=measure.__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--device")
    parser.add_argument("--revision")
    parser.add_argument("--attention")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--local", type=Path, default=LOCAL_COPIES)
    parser.add_argument("--local-bytes", type=int, default=LOCAL_COPIES_BYTES)
    status, stdout = 0, sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        try:
            result = measure(**vars(parser.parse_args()))
        except TeachercacheError as error:
            result = {"error": {"type": type(error).__name__, "message": str(error)}}
            status = error.exit_status
    print(json.dumps(result), file=stdout)
    return status


if __name__ == "__main__":
    sys.exit(main())
