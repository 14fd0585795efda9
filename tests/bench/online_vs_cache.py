"""Time that a cache saves over a live teacher: the same student, rows, order and steps, the same loss in the output layer.

    python tests/bench/online_vs_cache.py WORK_FOLDER [--steps 40] [--layers 4] [--rows 4] [--out FILE] [--json]

    ce       plain fine-tuning: cross-entropy alone, its logits in chunks like those of the others
    cache    a cache of the default kind, preset compact; decoding included
    online   SmolLM2-135M runs at every step, without gradients; its logits too are formed a chunk at a time

The arms learn side by side (T = 1, pure forward KL), so that a busy machine slows all of them; medians over the steps, ratios
within each step. A step is batch, forward, backward, clipping and AdamW. Beside them stands what floating-point operations
alone would give: matrices of the teacher once, of the student three times, of the sketch once. In the end the held-out loss
(CE, nats) of each.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kd_against_ce import teachercache
from provenance import add_output_options, provenance, publish
from student_loss import student_loss
from student_quality import LEARNING_RATE, POLICIES, TARGETS, WARM_UP, Bench, LiveTail
from torch import Tensor

from teachercache.cache import Cache
from teachercache.models.loading import load_causal_lm
from teachercache.objective import NO_TARGET
from teachercache.objective.logits.operands import Weights, no_teacher
from teachercache.quickstart import write_recipe
from teachercache.stream.cache_rows import OwnRows
from teachercache.stream.collate import Collator
from teachercache.stream.order.batch_plan import BatchPlan
from teachercache.stream.sources import train_order
from teachercache.targets import Softened

ARMS = ("ce", "cache", "online")


@dataclass(frozen=True, eq=False)
class Online:
    """A live teacher at T = 1, up to its output layer: logits of some positions are formed when a loss asks for them."""

    hidden_ND: Tensor
    weight_VD: Tensor

    def at(self, part: slice) -> Softened:
        """Its distribution there: a head of one token, and a tail that is exact."""
        logits_CV = self.hidden_ND[part] @ self.weight_VD.T
        largest_C1, ids_C1 = logits_CV.max(dim=-1, keepdim=True)
        head_C1 = largest_C1 - logits_CV.logsumexp(-1, keepdim=True)
        rest_C = torch.log1p(-head_C1.exp()).clamp_min(-80.0)[:, 0]
        return Softened(ids_C1, head_C1, rest_C, LiveTail(logits_CV))


class SideBySide(Bench):
    """One cache, its teacher, and a student for each arm."""

    def __init__(self, work: Path, layers: int) -> None:
        recipe_file, recipe = write_recipe(work / "sketch", [f"targets.logits={TARGETS['sketch']}"])
        assert recipe.teacher is not None
        if not (recipe.cache / "manifest.json").is_file():
            teachercache("precompute", str(recipe_file))
        self.caches = {"sketch": Cache.open(recipe.cache)}
        self.cache = self.caches["sketch"]
        self.student_folder = work / f"student-{layers}"
        if not (self.student_folder / "config.json").is_file():
            out = ("--layers", f"keep:{layers}", "--out", str(self.student_folder))
            teachercache("init-student", recipe.teacher.model, *out)
        self.teacher: Any = load_causal_lm(recipe.teacher.model, dtype="float32").eval()
        self.policy = POLICIES["sketch"]
        self.students: dict[str, Any] = {
            arm: load_causal_lm(str(self.student_folder), dtype="float32").train() for arm in ARMS
        }
        self.optimizers = {arm: torch.optim.AdamW(student.parameters()) for arm, student in self.students.items()}

    def step(self, arm: str, rows: list[int], rate: float) -> float:
        """Seconds of one step."""
        began = time.perf_counter()
        columns = self.cache.kind.objective_columns(self.policy) if arm == "cache" else ()
        batch = Collator.of(OwnRows(self.cache, columns))(
            [self.cache.read_row("train", row, columns=columns) for row in rows]
        )
        targets, labels_BS = batch.pop("targets"), batch.pop("shift_labels")
        labels_R = labels_BS.reshape(-1)
        positions_N = (labels_R != NO_TARGET).nonzero()[:, 0]
        teacher: Any
        if arm == "online":
            teacher = self._online(batch, positions_N)
        elif arm == "cache":
            teacher = self.cache.kind.softened(targets, 1.0, tail=self.policy, xp=torch)
        else:
            teacher = no_teacher(labels_R[positions_N], torch.float32)
        student, optimizer = self.students[arm], self.optimizers[arm]
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = student_loss(
            student,
            batch,
            labels_BS,
            teacher=teacher,
            weights=Weights(0.0 if arm == "ce" else 1.0, 1.0),
            vocabulary_size=self.cache.manifest.vocabulary_size,
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        return time.perf_counter() - began

    @torch.no_grad()
    def _online(self, batch: dict[str, Tensor], positions_N: Tensor) -> Online:
        hidden_BSD = self.teacher.base_model(**batch, use_cache=False)[0]
        weight_VD = self.teacher.get_output_embeddings().weight.detach()[: self.cache.manifest.vocabulary_size]
        return Online(hidden_BSD.flatten(0, 1)[positions_N], weight_VD)

    def flops(self) -> dict[str, float]:
        """Operations of a position in a step, in millions: multiplications and additions in matrices, attention apart."""
        student, teacher = (2 * matrix_elements(model) / 1e6 for model in (self.students["ce"], self.teacher))
        basis = self.cache.kind.basis  # type: ignore[attr-defined]
        sketch = 2 * basis.rank * basis.vocabulary_size / 1e6
        return {"ce": 3 * student, "cache": 3 * student + sketch, "online": 3 * student + teacher}


def matrix_elements(model: torch.nn.Module) -> int:
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    bench = SideBySide(options.work, options.layers)
    steps = options.steps
    plan = BatchPlan(train_order(bench.cache, seed=0), options.rows, options.rows, 1)
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for step in range(steps):
        rate = LEARNING_RATE * min((step + 1) / (WARM_UP * steps), 1 - step / steps)
        for arm in (*ARMS[step % 3 :], *ARMS[: step % 3]):  # no arm always goes first
            took = bench.step(arm, plan.step_rows(step).tolist(), rate)
            if step:  # the first one warms up
                seconds[arm].append(took)
        print(f"\rstep {step + 1} of {steps}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    held_out = {arm: bench._held_out(student)["held_out_loss"] for arm, student in bench.students.items()}
    flops = bench.flops()
    pairs = {"online_over_cache": ("online", "cache"), "cache_over_ce": ("cache", "ce")}
    return {
        **provenance(),
        **{name: getattr(options, name) for name in ("steps", "layers", "rows", "threads")},
        "seconds": {arm: round(statistics.median(values), 3) for arm, values in seconds.items()},
        "ratios": {
            name: round(statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True)), 3)
            for name, (a, b) in pairs.items()
        },
        "ratios_of_flops": {name: round(flops[a] / flops[b], 3) for name, (a, b) in pairs.items()},
        "held_out_loss": {arm: round(loss, 4) for arm, loss in held_out.items()},
        "cache_worse_than_online": round(held_out["cache"] / held_out["online"] - 1, 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    for name, value in (("steps", 40), ("layers", 4), ("rows", 4), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    add_output_options(parser)
    options = parser.parse_args()
    result = measure(options)
    publish(result, options)


if __name__ == "__main__":
    main()
