"""Train a student from a cache, in Python: `python docs/examples/train_from_python.py CACHE STUDENT OUTPUT [STEPS]`.

`DistillationTrainer` is a `transformers.Trainer`: arguments, callbacks and checkpoints are as you know them. The cache takes
the place of the datasets and of the teacher.
"""

import sys

from transformers import AutoModelForCausalLM, TrainingArguments

from teachercache import Cache, DistillationTrainer, ObjectiveConfig


def main(cache: str, student: str, output: str, steps: str = "100") -> None:
    trainer = DistillationTrainer(
        model=AutoModelForCausalLM.from_pretrained(student),
        cache=Cache.open(cache),
        objective=ObjectiveConfig(alpha=0.9, temperature=2.0),
        args=TrainingArguments(
            output,
            max_steps=int(steps),
            per_device_train_batch_size=4,
            learning_rate=6e-4,
            logging_steps=1,
            report_to=[],
        ),
    )
    trainer.train()
    print(trainer.evaluate()["eval_loss"])
    trainer.save_model(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
