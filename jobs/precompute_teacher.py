"""`teachercache precompute` as a script, for Ray's job server:

ray job submit --working-dir jobs -- python precompute_teacher.py recipes/RECIPE -s cache=/shared/CACHE [--json]
"""

import sys

from teachercache.cli import main

if __name__ == "__main__":
    main(["precompute", *sys.argv[1:]])
