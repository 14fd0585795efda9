"""A training job from its recipe to its exported student.

train.py             `run_training`: the whole job
launch.py            alone, or under `deepspeed` / `torchrun`: processes, devices, and what they print
arguments.py         a recipe to `transformers.TrainingArguments`
deepspeed_config.py  ZeRO stage and precision to a DeepSpeed configuration
run_folder.py        OUTPUT: whose run it is, and whether it is finished
export.py            a checkpoint to OUTPUT/student
stopping.py          the tokens that an exported student stops at
summary.py           what a finished run says about itself
"""
