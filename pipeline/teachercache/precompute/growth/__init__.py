"""Growth: what a finished cache gets later. What it had stays as it is, and its manifest of before under `snapshots/`.

further_targets.py  layers for rows that are there: what is added, and the cache that has it
further_shards.py   the further targets of one shard, and the files that they are read by
new_rows.py         rows of the corpus that the cache does not have
stages.py           both on Ray
job.py              from a recipe to the cache that has grown
"""
