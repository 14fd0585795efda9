"""Ray under the precompute jobs.

cluster.py    join a cluster or start one, and run units through it
local_ray.py  a cluster on this machine for one job: nobody else can speak to it
placement.py  where the teacher runs: how many actors, and whether each has a GPU
"""
