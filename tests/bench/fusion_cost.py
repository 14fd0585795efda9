"""The cost of a second teacher: the loss of a training step, inside the output layer, with one teacher and with two.

    python tests/bench/fusion_cost.py [--rows 4] [--length 256] [--rounds 9] [--json]

The loss is forward and backward from what enters the output layer of a student like SmolLM2-135M (hidden 576, V = 49152),
alpha 0.9. Each teacher has a head of 10 and a sketch of rank 320. `one` is one teacher without fusion, `one, fused` the
general path with a weight of zero for the other, `other tokens` a second teacher with a vocabulary of its own (32,000 tokens)
that speaks at two positions of three. Contestants take turns, in one process. Medians over the rounds; ratios to `one` at the
same temperature within each round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from divergence_step import ALPHA, HIDDEN, V, teacher
from provenance import add_output_options, provenance, publish
from torch import Tensor
from turns import Contestants, compare

from teachercache.objective.cross_tokenizer.projected_kl import VocabularyProjection
from teachercache.objective.ensemble.fused_tail import FusedTail, Fusion
from teachercache.objective.ensemble.teacher_view import TeacherView
from teachercache.objective.logits.operands import Weights
from teachercache.objective.logits.projected import projected_sums
from teachercache.targets.logits.softened import Softened

U = 32000  # tokens of another vocabulary


def fused(teacher_views: list[TeacherView], weight_NK: Tensor, fusion: Fusion) -> Softened:
    none_N0 = torch.empty(len(weight_NK), 0)
    return Softened(
        none_N0.long(), none_N0, torch.zeros(len(weight_NK)), FusedTail(teacher_views, weight_NK, fusion, V)
    )


def teachers(positions: int, temperature: float) -> dict[str, Softened]:
    one, two = (teacher(positions, temperature, sketch=True, seed=seed) for seed in (1, 2))
    teacher_views = [TeacherView.of(each, None, positions=positions) for each in (one, two)]
    equal_N2 = torch.full((positions, 2), 0.5)
    alone_N2 = torch.tensor([[1.0, 0.0]]).expand(positions, 2)
    at_n = torch.arange(positions)[torch.arange(positions) % 3 > 0]
    first_U = torch.randint(0, V, (U,), generator=torch.Generator().manual_seed(3))
    projection = VocabularyProjection(first_U, torch.zeros(V, dtype=torch.bool).index_fill(0, first_U, True))
    abroad = TeacherView.of(
        teacher(len(at_n), temperature, sketch=True, seed=4, tokens=U), at_n, positions=positions, projection=projection
    )
    other_N2 = equal_N2.clone()
    other_N2[::3] = torch.tensor([1.0, 0.0])
    return {
        "one": one,
        "one, fused": fused(teacher_views, alone_N2, "arithmetic"),
        "arithmetic": fused(teacher_views, equal_N2, "arithmetic"),
        "geometric": fused(teacher_views, equal_N2, "geometric"),
        "other tokens": fused([teacher_views[0], abroad], other_N2, "arithmetic"),
    }


def runs(options: argparse.Namespace) -> Contestants:
    count = options.rows * options.length
    hidden_ND, weight_VD = torch.randn(count, HIDDEN), torch.randn(V, HIDDEN) * 0.1
    labels_N = torch.randint(0, V, (count,))

    def alone(target: Softened, temperature: float) -> Callable[[int], None]:
        def run(_: int) -> None:
            operands = (hidden_ND.detach().requires_grad_(), weight_VD.detach().requires_grad_())
            total, _, _ = projected_sums(
                *operands, None, labels_N=labels_N, teacher=target, weights=Weights(ALPHA, temperature), vocabulary_size=V
            )  # fmt: skip
            (total / count).backward()

        return run

    return {
        f"{name} T={temperature:g}": alone(target, temperature)
        for temperature in (1.0, 2.0)
        for name, target in teachers(count, temperature).items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rows", 4), ("length", 256), ("rounds", 9), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    add_output_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {name: getattr(options, name) for name in ("rows", "length", "rounds", "threads")}
    loss = compare("loss", runs(options), options.rounds, base="one", of=lambda name: f"one {name.rpartition(' ')[2]}")
    publish({**provenance(), **settings, "loss": loss}, options)


if __name__ == "__main__":
    main()
