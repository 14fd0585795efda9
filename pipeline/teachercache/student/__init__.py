"""The training job: a cache and a student in, a plain Hugging Face folder out.

    train.py             `run_training`: a recipe from its first check to its exported student
    fit.py               what is refused before the first step
    launch.py            alone, or under `deepspeed` / `torchrun`: processes, devices, and what they print
    run_folder.py        OUTPUT: whose run it is, and whether it is finished
    checkpoints.py       which checkpoint folders are whole
    elastic.py           going on with another number of processes than wrote a checkpoint
    universal.py         a checkpoint that any number can load
    disk.py              a full disk, in one line
    deepspeed_config.py  ZeRO stage and precision to a DeepSpeed configuration
    arguments.py         a recipe to `transformers.TrainingArguments`
    trainer.py           `DistillationTrainer`
    teachers.py          several teachers: their caches and weights
    teachers_fit.py      what is refused of them before the first step
    teacher_losses.py    what they lose on held-out rows
    held_out_teachers.py evaluation against each of them
    layers.py            terms between layers: adapters in the student, what its layers hold
    lora.py              low-rank adapters
    cadence.py           when it logs, evaluates and saves
    divergence.py        ends a run that cannot learn any more
    meter.py             loss terms of a logging window, over micro-batches and processes
    held_out.py          evaluation on the held-out split
    progress.py          progress bar and log.jsonl
    export.py            a checkpoint to OUTPUT/student

    init_student.py      a student from a model's own layers

No part of it loads the teacher.
"""
