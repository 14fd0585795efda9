"""Ray under the precompute jobs.

cluster.py    join a cluster or start one, and run tasks on it
unit_source.py units as a source of Ray Data, some to a block
local_ray.py  a cluster on this machine for one job: nobody else can speak to it
placement.py  where the teacher runs: how many actors, and whether each has a GPU
fork_server.py   processes that may die without harm to the one that asks them
forks.py      the server that they are forked from
termination.py  ends that come from outside: SIGTERM, and the death of Ray's own processes
carried_errors.py  exceptions of stages, as a part of rows
records.py    what a job finds of an earlier run of itself, or refuses in one line
timing.py     what a capture job has made, how fast, and what is to come
progress.py   what users see meanwhile
event_log.py  a line of JSON for each event, beside the cache
metrics.py    rows, positions and bytes for Ray's dashboard and Prometheus
"""
