"""Tests reach no model hub and send nothing anywhere."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Several processes on few cores crawl when each of them spins on all cores; child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
