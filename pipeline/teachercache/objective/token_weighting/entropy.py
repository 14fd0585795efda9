"""Entropy of next-token distributions at T = 1, in nats: the student's from its logits, the teacher's from what is cached.

Softmax and a dot product, a block of positions at a time: nothing as large as a batch's logits is made. With u = z - max z,

    H = log Σ exp(u) - Σ p · u

whose terms are small where p is certain: float32 then errs by 1e-7, not by that of a logit.

Shapes: N positions, C of a chunk, D width, R rows of flat logits, L columns of them, V vocabulary.
The student's entropy is over all columns, padding included: so it would be sampled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from teachercache.objective.logits.blocks import blocks
from teachercache.objective.logits.dense import NOTHING
from teachercache.objective.logits.projected import autocast_type, chunk_logits, chunk_rows
from teachercache.objective.logits.student_output import StudentOutput
from teachercache.objective.logits.tail_logits import CHUNK_POSITIONS, TailLogits
from teachercache.targets.logits.softened import Softened


def entropy_of_output(output: StudentOutput, *, positions_N: Tensor) -> Tensor:
    """[N] of a student's distributions, without a gradient. `positions_N` are rising indices into [B · S]."""
    layer = output.layer
    if layer is None:
        return entropy_of_logits(output.values_RA, positions_N=positions_N)
    hidden_ND = output.values_RA[positions_N]
    return entropy_projected(hidden_ND, layer.weight_LD, layer.bias_L, softcap=layer.softcap)


def entropy_of_logits(logits_RL: Tensor, *, positions_N: Tensor, consecutive: bool = False) -> Tensor:
    """[N], float32 (float64 of float64 logits), without a gradient. `positions_N` are rising indices into R, or all of them
    where they are `consecutive`."""
    dtype = torch.float64 if logits_RL.dtype == torch.float64 else torch.float32
    entropy_N = torch.empty(len(positions_N), dtype=dtype, device=logits_RL.device)
    with torch.no_grad(), torch.autocast(logits_RL.device.type, enabled=False):
        for block in blocks(
            logits_RL,
            None,
            positions_N=positions_N,
            vocabulary_size=logits_RL.shape[1],
            dtype=dtype,
            block_bytes=None,
            consecutive=consecutive,
        ):
            shifted_CL = block.spare_CL.copy_(block.logits_CL)
            entropy_N[block.part] = _entropy(shifted_CL, block.values_CL)
    return entropy_N


def entropy_projected(
    hidden_ND: Tensor,
    weight_LD: Tensor,
    bias_L: Tensor | None,
    *,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """The same of the logits cap(hidden · weightᵀ + bias), [N]: one more pass of the output layer, in the type in which
    `projected_sums` makes it."""
    dtype, chunk = autocast_type(hidden_ND.device.type, weight_LD.dtype), chunk_rows(weight_LD, chunk_bytes)
    with torch.no_grad(), torch.autocast(hidden_ND.device.type, enabled=False):
        hidden_ND, weight_LD = hidden_ND.to(dtype), weight_LD.to(dtype)
        bias_L = None if bias_L is None else bias_L.to(dtype)
        entropies = []
        for start in range(0, len(hidden_ND), chunk):
            logits_CL = chunk_logits(hidden_ND[start : start + chunk], weight_LD, bias_L, softcap)
            all_C = torch.arange(len(logits_CL), device=logits_CL.device)
            entropies.append(entropy_of_logits(logits_CL, positions_N=all_C, consecutive=True))
    return torch.cat(entropies) if entropies else hidden_ND.new_zeros(0, dtype=torch.float32)


def entropy_of_teacher(teacher: Softened, *, vocabulary_size: int) -> Tensor:
    """[N] of a distribution at T = 1: the head's outcomes exactly, and a tail of mass p by its shape,

        -p log p + p · H(shape)

    A tail that is one bucket (`ghost`) counts as one outcome, which is the least that it can be; `renormalise` leaves none.
    """
    with torch.no_grad(), torch.autocast(teacher.tail_log_prob_N.device.type, enabled=False):
        tail_N = teacher.tail_log_prob_N.exp()
        entropy_N: Tensor = torch.special.entr(teacher.head_log_prob_Nk.exp()).sum(-1) + torch.special.entr(tail_N)
        if teacher.tail is None:
            return entropy_N
        return entropy_N + torch.where(tail_N > 0, tail_N * _of_tail(teacher, vocabulary_size), 0.0)


def _of_tail(teacher: Softened, vocabulary_size: int) -> Tensor:
    """H of the softmax of the tail's logits over the tokens outside the head, [N]."""
    assert teacher.tail is not None
    like_N = teacher.tail_log_prob_N
    entropy_N = torch.empty_like(like_N)
    logits = TailLogits(teacher.tail, positions=len(like_N), vocabulary_size=vocabulary_size)
    share_CV = like_N.new_empty(min(CHUNK_POSITIONS, len(like_N)), vocabulary_size)
    for start in range(0, len(like_N), CHUNK_POSITIONS):
        part = slice(start, min(start + CHUNK_POSITIONS, len(like_N)))
        tail_CV = logits.of(part, share_CV).scatter_(1, teacher.head_ids_Nk[part], NOTHING)
        entropy_N[part] = _entropy(tail_CV, share_CV[: len(tail_CV)])
    return entropy_N


def _entropy(logits_CV: Tensor, share_CV: Tensor) -> Tensor:
    """[C]; overwrites both. Whatever has no share adds nothing, also where its logit is -inf."""
    torch.softmax(logits_CV, -1, out=share_CV)
    logits_CV.sub_(logits_CV.amax(-1, keepdim=True)).clamp_min_(NOTHING)
    entropy_C: Tensor = -share_CV.amax(-1).log() - torch.linalg.vecdot(share_CV, logits_CV)
    return entropy_C.clamp_min_(0.0)
