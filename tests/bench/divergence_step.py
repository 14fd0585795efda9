"""The cost of a teacher beside plain cross-entropy: a whole training step, and the loss alone.

    python tests/bench/divergence_step.py [--layers 8] [--rows 4] [--length 256] [--rounds 9] [--json]

A step is forward, backward and AdamW of a student like SmolLM2-135M (hidden 576, V = 49152, tied) with fewer layers;
the loss alone is its forward and backward from given logits. Contestants take turns on the same batch, in one process.
`ce` is `torch.nn.functional.cross_entropy` on whole logits, `chunked ce` ours without a teacher, `ghost` and `sketch` are
ours with the tail as a bucket or as a sketch of rank 320 (alpha 0.9), `naive` writes full-vocabulary distillation from
stored dense logits in plain torch. Medians over the rounds; ratios to `ce` within each round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from provenance import add_output_options, provenance, publish
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from turns import Contestants, compare

from teachercache.objective.logits.divergences import Divergence, JensenShannon, forward_kl, reverse_kl, total_variation
from teachercache.objective.logits.fused import distillation_sums
from teachercache.objective.logits.operands import Weights, no_teacher
from teachercache.objective.logits.projected import projected_sums
from teachercache.targets.logits.softened import SketchTail, Softened

V, HIDDEN, RANK, HEAD, ALPHA = 49152, 576, 320, 10, 0.9
Loss = Callable[[Tensor, Tensor], Tensor]  # logits [B, S, V] and labels [N] -> the mean over positions


def student(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V, hidden_size=HIDDEN, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
            num_key_value_heads=3, tie_word_embeddings=True,
        )
    ).train()  # fmt: skip


def teacher(positions: int, temperature: float, *, sketch: bool, seed: int = 1, tokens: int = V) -> Softened:
    """A head and a tail that sum to one, with a sketch or without."""
    generator = torch.Generator().manual_seed(seed)
    tail = SketchTail(
        torch.randn(positions, RANK, generator=generator) / temperature,
        torch.randn(tokens, RANK, generator=generator) * 0.1,
        torch.randn(tokens, generator=generator) / temperature,
    )
    ids_Nk = torch.rand(positions, tokens, generator=generator).topk(HEAD).indices
    log_p_NA = (torch.randn(positions, HEAD + 1, generator=generator) * 3 / temperature).log_softmax(-1)
    return Softened(ids_Nk, log_p_NA[:, :HEAD].contiguous(), log_p_NA[:, HEAD].contiguous(), tail if sketch else None)


def cached(positions: int, temperature: float, divergence: Divergence = forward_kl, *, sketch: bool) -> Loss:
    target = teacher(positions, temperature, sketch=sketch)

    def loss(logits_BSV: Tensor, labels_N: Tensor) -> Tensor:
        total, _, _ = distillation_sums(
            logits_BSV, positions_N=torch.arange(positions), labels_N=labels_N, teacher=target,
            weights=Weights(ALPHA, temperature), vocabulary_size=V, divergence=divergence,
        )  # fmt: skip
        return total / positions

    return loss


def cross_entropy(logits_BSV: Tensor, labels_N: Tensor) -> Tensor:
    return F.cross_entropy(logits_BSV.view(-1, V), labels_N)


def naive(positions: int, temperature: float) -> Loss:
    teacher_NV = torch.randn(positions, V)

    def loss(logits_BSV: Tensor, labels_N: Tensor) -> Tensor:
        z_NV = logits_BSV.view(-1, V)
        log_p_NV = (teacher_NV / temperature).log_softmax(-1)
        kl = F.kl_div((z_NV / temperature).log_softmax(-1), log_p_NV, reduction="batchmean", log_target=True)
        return ALPHA * temperature**2 * kl + (1 - ALPHA) * F.cross_entropy(z_NV, labels_N)

    return loss


def losses(positions: int) -> dict[str, Loss]:
    ours = {
        f"{tail} T={temperature:g}": cached(positions, temperature, sketch=tail == "sketch")
        for tail in ("ghost", "sketch")
        for temperature in (1.0, 2.0)
    }
    return {"ce": cross_entropy} | ours


def more_losses(positions: int) -> dict[str, Loss]:
    others = {"reverse-kl": reverse_kl, "jensen-shannon": JensenShannon(), "total-variation": total_variation}
    ours = {f"sketch T=2 {name}": cached(positions, 2.0, form, sketch=True) for name, form in others.items()}
    return losses(positions) | ours | {f"naive T={t:g}": naive(positions, t) for t in (1.0, 2.0)}


def step_runs(options: argparse.Namespace) -> Contestants:
    model = student(options.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    ids_BS = torch.randint(0, V, (options.rows, options.length))
    labels_N = torch.randint(0, V, (options.rows * options.length,))

    def step(loss: Callable[[], Tensor]) -> Callable[[int], None]:
        def run(_: int) -> None:
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    def plain() -> Tensor:
        return cross_entropy(model(input_ids=ids_BS, use_cache=False).logits, labels_N)

    def projected(target: Softened, weights: Weights) -> Callable[[], Tensor]:
        """The loss inside the output layer, as training forms it."""

        def loss() -> Tensor:
            hidden_ND = model.model(input_ids=ids_BS, use_cache=False)[0].flatten(0, 1)
            total, _, _ = projected_sums(
                hidden_ND,
                model.lm_head.weight,
                None,
                labels_N=labels_N,
                teacher=target,
                weights=weights,
                vocabulary_size=V,
            )
            return total / len(labels_N)

        return loss

    count = len(labels_N)
    runs = {"ce": plain, "chunked ce": projected(no_teacher(labels_N, torch.float32), Weights(0.0, 1.0))}
    for tail in ("ghost", "sketch"):
        for temperature in (1.0, 2.0):
            target = teacher(count, temperature, sketch=tail == "sketch")
            runs[f"{tail} T={temperature:g}"] = projected(target, Weights(ALPHA, temperature))
    return {name: step(loss) for name, loss in runs.items()}


def loss_runs(options: argparse.Namespace) -> Contestants:
    logits_BSV = torch.randn(options.rows, options.length, V) * 3
    labels_N = torch.randint(0, V, (options.rows * options.length,))

    def alone(loss: Loss) -> Callable[[int], None]:
        return lambda _: loss(logits_BSV.detach().requires_grad_(), labels_N).backward()

    return {name: alone(loss) for name, loss in more_losses(len(labels_N)).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 8), ("rows", 4), ("length", 256), ("rounds", 9), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--only", choices=("step", "loss"), help="one of the two comparisons")
    add_output_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {name: getattr(options, name) for name in ("layers", "rows", "length", "rounds", "threads")}
    result: dict = {**provenance(), **settings}
    for title, runs in (("step", step_runs), ("loss", loss_runs)):
        if options.only in (None, title):
            result[title] = compare(title, runs(options), options.rounds, base="ce")
    publish(result, options)


if __name__ == "__main__":
    main()
