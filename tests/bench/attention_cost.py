"""The cost of a loss between attention maps for a block, forward and backward, and how much memory it holds.

    python tests/bench/attention_cost.py [--rows 4] [--length 256] [--window N] [--rounds 15] [--json]

Heads like SmolLM2-135M's (9 of 64 channels, 3 of keys), the teacher's rebuilt from queries and keys, KL. `ours` is the term of
`objective.layers`, `checkpointed` the same in plain torch whose maps are formed once more in the backward pass, `plain` keeps
them. Contestants take turns in one process; medians over the rounds, ratios to `plain` within each round. `megabytes` is by how
much a call raises the highest resident memory, in a process of its own for each, after a call with tiny operands.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
from collections.abc import Callable

import torch
from provenance import add_output_options, provenance, publish
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from turns import compare

from teachercache.models.activations import Heads
from teachercache.objective.layers.attention import AttentionTerm
from teachercache.objective.layers.term import LayerBatch
from teachercache.targets.layers.attention import HeadShape, log_attention, sees
from teachercache.targets.layers.attention_factors import StoredHeads

HEADS, KEY_HEADS, WIDTH = 9, 3, 64
SCALING = WIDTH**-0.5
CONTESTANTS = ("plain", "checkpointed", "ours")


def losses(options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    sizes = [(options.rows, heads, options.length, WIDTH) for heads in (HEADS, KEY_HEADS)]
    queries, keys = (torch.randn(size) for size in sizes)
    theirs = [torch.randn(size) for size in sizes]
    segment_BS = torch.zeros(options.rows, options.length, dtype=torch.int64)
    first_BS = torch.zeros_like(segment_BS, dtype=torch.bool)
    shape = HeadShape(HEADS, KEY_HEADS, WIDTH, SCALING, options.window)
    taught = StoredHeads(theirs[0], theirs[1], None, shape, None)
    term = AttentionTerm("attention-kl", ((1, 1),), heads="average", student_heads=HEADS, teacher_heads=HEADS)

    def ours(queries: Tensor, keys: Tensor) -> Tensor:
        heads = Heads(queries, keys, keys, scaling=SCALING)
        return term.loss(LayerBatch(segment_BS == 0, segment_BS, first_BS, {}, {1: heads}, {}, {1: taught}))

    def plain(queries: Tensor, keys: Tensor) -> Tensor:
        seen = sees(torch, segment_BS, window=options.window)
        log_p, log_q = (
            log_attention(*each, seen, scaling=SCALING).masked_fill(~seen[:, None], 0.0)
            for each in (theirs, (queries, keys))
        )
        p = log_p.exp() * seen[:, None]
        return (p * (log_p - log_q)).sum(-1).mean(1).sum()

    forms = {"plain": plain, "checkpointed": lambda *a: checkpoint(plain, *a, use_reentrant=False), "ours": ours}

    def run(name: str) -> None:
        forms[name](queries.detach().requires_grad_(), keys.detach().requires_grad_()).backward()

    return {name: lambda name=name: run(name) for name in CONTESTANTS}


def peak(options: argparse.Namespace, name: str) -> float:
    """Megabytes by which one call raises the highest resident memory."""
    torch.set_num_threads(options.threads)
    losses(argparse.Namespace(rows=1, length=8, window=None))[name]()  # what a first call loads
    chosen = losses(options)[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    chosen()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rows", 4), ("length", 256), ("rounds", 15), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--window", type=int, help="keys that a query sees, itself included; default: all")
    add_output_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        megabytes = {name: round(pool.apply(peak, (options, name)), 1) for name in CONTESTANTS}
    settings = {name: getattr(options, name) for name in ("rows", "length", "window", "rounds", "threads")}
    turns = {name: lambda _, run=run: run() for name, run in losses(options).items()}
    found = compare("attention-kl", turns, options.rounds, base="plain")
    publish({**provenance(), **settings, **found, "megabytes": megabytes}, options)


if __name__ == "__main__":
    main()
