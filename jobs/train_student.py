"""`teachercache train`, for the launchers that start one process per GPU:

deepspeed --no_local_rank jobs/train_student.py RECIPE [-s key.path=value] [--json]
torchrun --nproc_per_node 2 jobs/train_student.py RECIPE [-s key.path=value] [--json]
"""

import sys

from teachercache.cli import app
from teachercache.student.launch import is_main_process

if __name__ == "__main__":
    # One JSON document, not one from every process.
    app(["train", *(argument for argument in sys.argv[1:] if argument != "--json" or is_main_process())])
