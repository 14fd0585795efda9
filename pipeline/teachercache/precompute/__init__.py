"""The precompute job: corpus → staged units → tokens → teacher actors → shards → manifest. The only package that imports Ray.

    plan.py      what the job is: identity (fingerprint); decides between new, resumed and finished
    layers.py    what a recipe asks for of layers, with the teacher's numbers
    staging.py   the corpus as files of raw documents, one a work unit
    units.py     one unit through its two stages, as plain functions: tokenise; capture and write
    cluster.py   Ray: start or join a cluster, run units through the stages
    commit.py    records of finished units → audit, digests, card, manifest
    job.py       the whole job, `run_precompute`

A *unit* is a deterministic slice of the corpus; it becomes one shard and one record in `.work/done/`, each by temp file and
rename. Running a job again skips the units that have a record: exactly once, whatever was killed, without Ray's own
checkpointing (beta in 2.60: it keeps all ids in memory, and its resume hung on two CPUs in our trial).
"""
