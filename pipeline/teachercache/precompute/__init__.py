"""The precompute jobs. The only package that imports Ray.

    planning/ corpus → partitions → rows, counted → units
    capture/  units → tokens → teacher actors → shards → manifest
    growth/   rows and layers that are added to a finished cache
    job.py    a new cache, or growth, as a recipe and its cache have it
    align/    a cache's rows in the tokens of a student with another tokenizer
    estimate/ what a job will take, from a timed sample; without Ray
    engine/   Ray under both: a cluster to join or to start, units through it, what users see meanwhile

A *unit* is a deterministic slice of the corpus; it becomes one shard and one record in `.work/done/`, each put whole into the
cache's store (`cache/stores/`). Running a job again skips the units that have a record: exactly once, whatever was killed,
without Ray's own checkpointing (beta in 2.60: it keeps all ids in memory, and its resume hung on two CPUs in our trial).
"""
