"""Peak memory of a training step at a large vocabulary, by how the loss is computed.

    python tests/bench/step_memory.py [--vocabulary 151936] [--length 2048] [--width 64] [--json]

A random student of small width, so that the vocabulary decides; forward and backward of one row, each in a process of its
own. Counted are the megabytes above what the process held before the step (its parameters and the targets):

    naive        all logits of the batch, and full-vocabulary KL against a dense teacher, as one writes it down
    whole        all logits of the batch, our loss on them (a gradient buffer beside them)
    ghost        the loss inside the output layer, in chunks; the tail of the teacher as one bucket
    sketch       ... the tail as a sketch of rank 320
    chunked CE   the same code without a teacher
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys

import torch
from provenance import add_output_options, provenance, publish
from transformers import LlamaConfig, LlamaForCausalLM

ARMS = ("naive", "whole", "ghost", "sketch", "chunked CE")
HEAD, RANK, TEMPERATURE, ALPHA = 12, 320, 2.0, 0.9


def peak(arm: str, *, vocabulary: int, length: int, width: int) -> dict[str, float]:
    """Megabytes and seconds of one step."""
    import time

    from teachercache.objective.logits.fused import distillation_sums
    from teachercache.objective.logits.operands import Weights, no_teacher
    from teachercache.objective.logits.projected import projected_sums
    from teachercache.targets.logits.softened import SketchTail, Softened

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=length, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    ids_BS = torch.randint(0, vocabulary, (1, length))
    labels_N, positions_N, count = ids_BS[0, 1:], torch.arange(length - 1), length - 1
    log_p_NA = torch.randn(count, HEAD + 1).log_softmax(-1)
    ids_Nk = torch.randint(0, vocabulary - HEAD, (count, 1)) + torch.arange(HEAD)
    teacher = Softened(ids_Nk, log_p_NA[:, :HEAD].contiguous(), log_p_NA[:, HEAD].contiguous())
    if arm == "sketch":
        tail = SketchTail(torch.randn(count, RANK), torch.randn(vocabulary, RANK), torch.randn(vocabulary))
        teacher = teacher.with_tail(tail)
    weights = Weights(ALPHA, TEMPERATURE)
    if arm == "chunked CE":
        teacher, weights = no_teacher(labels_N, torch.float32), Weights(0.0, 1.0)
    model(input_ids=ids_BS[:, :8]).logits.sum().backward()  # gradients of the parameters stay
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    operands = {"labels_N": labels_N, "teacher": teacher, "weights": weights, "vocabulary_size": vocabulary}
    if arm == "naive":
        teacher_SV = torch.randn(length - 1, vocabulary)
        logits_SV = model(input_ids=ids_BS, use_cache=False).logits[0, :-1]
        log_q_SV = (logits_SV / TEMPERATURE).log_softmax(-1)
        log_p_SV = (teacher_SV / TEMPERATURE).log_softmax(-1)
        kl = torch.nn.functional.kl_div(log_q_SV, log_p_SV, log_target=True, reduction="sum")
        ce = torch.nn.functional.cross_entropy(logits_SV, labels_N, reduction="sum")
        total = ALPHA * TEMPERATURE**2 * kl + (1 - ALPHA) * ce
    elif arm == "whole":
        logits_BSV = model(input_ids=ids_BS, use_cache=False).logits
        total, _, _ = distillation_sums(logits_BSV, positions_N=positions_N, **operands)
    else:
        hidden_ND = model.model(input_ids=ids_BS, use_cache=False)[0][0, :-1]
        total, _, _ = projected_sums(hidden_ND, model.lm_head.weight, None, **operands)
    (total / count).backward()
    seconds = time.perf_counter() - start
    return {"megabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("vocabulary", 151_936), ("length", 2048), ("width", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    add_output_options(parser)
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in ("vocabulary", "length", "width")}
    if options.arm:
        print(json.dumps(peak(options.arm, **sizes)))
        return
    arms = {}
    for arm in ARMS:
        command = [sys.executable, __file__, "--arm", arm, *(f"--{name}={value}" for name, value in sizes.items())]
        arms[arm] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    of_naive = {arm: round(figures["megabytes"] / arms["naive"]["megabytes"], 3) for arm, figures in arms.items()}
    publish({**provenance(), **sizes, "arms": arms, "of_naive": of_naive}, options)


if __name__ == "__main__":
    main()
