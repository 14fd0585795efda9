"""`teachercache train`, for the launchers that start one process per GPU:

deepspeed --no_local_rank jobs/train_student.py RECIPE [-s key.path=value] [--json]
torchrun --nproc_per_node 2 jobs/train_student.py RECIPE [-s key.path=value] [--json]
"""

import sys

from teachercache.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
