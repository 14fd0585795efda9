"""`teachercache align`: a cache's rows in the tokens of a student with another tokenizer, as a Ray Data job on CPUs.

    job.py     the whole job, `run_align`
    plan.py    what the job is, and which shards are done
    units.py   one shard: plain functions
    rows.py    one row: the two tokenizers over the same bytes
    reading.py what the student reads of a row: text, or a conversation by its own chat template
    turns.py   which special token ends a turn

The teacher is not run: what it said is in the cache. Run the job again to resume.
"""
