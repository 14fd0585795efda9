"""One optimizer step of plain gradient descent with routing, so that weights before and after it are gradients.

    torchrun --nproc_per_node 2 tests/training/trainer/routed_step.py CACHE STUDENT OUTPUT ZERO_STAGE OBJECTIVE [other-labels]

Run as a program where it needs several processes. OBJECTIVE is JSON. With `other-labels` the task is another one: every
next token is the one after it in the vocabulary.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

LEARNING_RATE = 1.0
ROWS = 8


def take_step(
    cache: Path, student: Path, output: Path, *, stage: int, objective: dict[str, Any], other_labels: bool = False
) -> None:
    """Leaves the weights after the step in OUTPUT/checkpoint-1."""
    from teachercache.training.job.launch import training_process

    with training_process() as process:
        import torch
        from transformers import TrainingArguments

        from teachercache.cache import Cache
        from teachercache.config import ObjectiveConfig, TrainConfig
        from teachercache.models.loading import load_causal_lm
        from teachercache.training.job.deepspeed_config import deepspeed_config
        from teachercache.training.trainer.trainer import DistillationTrainer

        class OtherLabels(DistillationTrainer):
            def get_batch_samples(self, *arguments: Any) -> Any:
                batches, positions = super().get_batch_samples(*arguments)
                for batch in batches:
                    labels = batch["shift_labels"]
                    batch["shift_labels"] = torch.where(labels == -100, labels, (labels + 1) % 300)
                return batches, positions

        kind = OtherLabels if other_labels else DistillationTrainer
        trainer = kind(
            model=load_causal_lm(str(student), dtype="float32"),
            cache=Cache.open(cache),
            args=TrainingArguments(
                output_dir=str(output), max_steps=1, per_device_train_batch_size=2, use_cpu=True, seed=0,
                gradient_accumulation_steps=ROWS // 2 // process.world_size, learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant", optim="sgd", max_grad_norm=1e9, save_strategy="steps", save_steps=1,
                logging_steps=1, report_to="none", disable_tqdm=True,
                deepspeed=deepspeed_config(TrainConfig(output=output, zero_stage=stage), on_gpu=False),
            ),
            objective=ObjectiveConfig.model_validate(objective),
        )  # fmt: skip
        trainer.train()
        steps = trainer.args.gradient_accumulation_steps
        assert trainer.model_wrapped.gradient_accumulation_steps() == steps == 2 * ROWS // 2 // process.world_size


if __name__ == "__main__":
    cache, student, output, stage, objective, *rest = sys.argv[1:]
    take_step(
        Path(cache), Path(student), Path(output), stage=int(stage), objective=json.loads(objective),
        other_labels=rest == ["other-labels"],
    )  # fmt: skip
