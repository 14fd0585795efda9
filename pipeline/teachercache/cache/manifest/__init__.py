"""Manifests: the description of a cache, and the checks that hold it against what a cache can be.

model.py               `Manifest`: what manifest.json says, and what follows from it
manifest.py            reading manifest.json, and committing it last
manifest_v1.py         manifests of format 1 as those of today
alignment_manifest.py  alignment.json: what an alignment with a student's tokenizer holds
index.py               the lists of shards and files that both name
checks.py              what they claim, checked before anything relies on it
snapshots.py          earlier manifests, kept by name
card.py                the generated README.md of a cache
"""
