"""`teachercache precompute`, for `ray job submit -- python jobs/precompute_teacher.py RECIPE [-s key.path=value] [--json]`."""

import sys

from teachercache.cli import app

if __name__ == "__main__":
    app(["precompute", *sys.argv[1:]])
