"""The cost of emphasis of hard positions: a whole training step, and the loss with its output layer alone.

    python tests/bench/emphasis_cost.py [--layers 8] [--rows 4] [--length 256] [--rounds 9] [--json]

The student is like SmolLM2-135M (hidden 576, V = 49152, tied) with fewer layers, the teacher a head of 10 and a sketch of rank
320 at T = 2, alpha 0.9; the loss is formed inside the output layer, as training forms it. `none` is without emphasis, which
takes the code path of a recipe without it. Contestants take turns on the same batch, in one process and thread. Medians over
the rounds of processor time, which other jobs on the machine change least; ratios to `none` within each round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from divergence_step import ALPHA, HIDDEN, V, student, teacher
from provenance import add_output_options, provenance, publish
from torch import Tensor
from turns import Contestants, compare

from teachercache.config import EmphasisConfig
from teachercache.objective.logits.operands import Weights
from teachercache.objective.logits.projected import projected_sums
from teachercache.objective.token_weighting.entropy import entropy_of_teacher, entropy_projected
from teachercache.objective.token_weighting.weights import emphasis_of

# Names of contestants: a score, and the share of positions that count where that is not all of them.
CONTESTANTS = ("none", "student-entropy", "teacher-entropy", "entropy-gap", "student-entropy 0.5", "entropy-gap 0.2")


def losses(options: argparse.Namespace, labels_N: Tensor) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Losses of hidden states [N, D] and the output matrix, a mean over positions, by score."""
    softened, sharp = (teacher(len(labels_N), temperature, sketch=True) for temperature in (2.0, 1.0))
    segment_N = torch.arange(options.rows).repeat_interleave(options.length)

    def loss(name: str) -> Callable[[Tensor, Tensor], Tensor]:
        score, _, top = name.partition(" ")

        def of(hidden_ND: Tensor, weight_LD: Tensor) -> Tensor:
            kept_N, weight_N = slice(None), None
            if score != "none":
                weight_N = emphasis_of(
                    EmphasisConfig.model_validate({"by": score, "top": float(top) if top else None}),
                    segment_N,
                    student_entropy=lambda: entropy_projected(hidden_ND, weight_LD, None),
                    teacher_entropy=lambda: entropy_of_teacher(sharp, vocabulary_size=V),
                ).weight_N
                kept_N = weight_N.nonzero()[:, 0]  # as `DistillationObjective` leaves out what weighs nothing
                weight_N = weight_N[kept_N]
            total, _, _ = projected_sums(
                hidden_ND[kept_N], weight_LD, None, labels_N=labels_N[kept_N], teacher=softened.at(kept_N),
                weights=Weights(ALPHA, 2.0), vocabulary_size=V, position_weight_N=weight_N,
            )  # fmt: skip
            return total / len(labels_N)

        return of

    return {name: loss(name) for name in CONTESTANTS}


def runs(options: argparse.Namespace) -> dict[str, Contestants]:
    model = student(options.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    ids_BS = torch.randint(0, V, (options.rows, options.length))
    of = losses(options, torch.randint(0, V, (ids_BS.numel(),)))
    hidden_ND = torch.randn(ids_BS.numel(), HIDDEN)

    def step(name: str) -> None:
        of[name](model.model(input_ids=ids_BS, use_cache=False)[0].flatten(0, 1), model.lm_head.weight).backward()
        optimizer.step()
        optimizer.zero_grad()

    def alone(name: str) -> None:
        of[name](hidden_ND.detach().requires_grad_(), model.lm_head.weight).backward()

    made = {"step": step, "loss": alone}
    return {title: {name: lambda _, f=f, n=name: f(n) for name in CONTESTANTS} for title, f in made.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 8), ("rows", 4), ("length", 256), ("rounds", 9), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    add_output_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {name: getattr(options, name) for name in ("layers", "rows", "length", "rounds", "threads")}
    result: dict = {**provenance(), **settings}
    for title, contestants in runs(options).items():
        result[title] = compare(title, contestants, options.rounds, base="none", clock=time.process_time)
    publish(result, options)


if __name__ == "__main__":
    main()
