"""Estimates what a precompute job will take, from a timed sample of its rows and counts of its corpus.

job.py         the whole estimate, `run_estimate`
counts.py      how many positions, tokens and units the corpus holds, and how sure that is
sample.py      the job's real stages on some of the rows, in this process, with a stopwatch
choice.py      which rows these are, within a time
measured.py    what was measured: seconds and bytes
sizes.py       where the bytes of the sample's cache are, and what they grow with
operations.py  floating-point operations of a position, counted
prediction.py  from what was measured to bytes and hours of the whole job
break_even.py  after how many students a cache has paid
devices.py     accelerators by their data sheets, and what a roofline says of a teacher on them
rendering.py   the table for people
"""
