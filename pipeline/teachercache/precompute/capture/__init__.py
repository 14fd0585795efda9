"""The precompute job: units of the corpus → tokens → teacher actors → shards → manifest.

job.py         the whole job, `run_precompute`
plan.py        what the job is: identity (fingerprint); decides between new, resumed and finished
given_calibration.py  basis and layer files that another cache has
input_form.py  whether rows begin as the teacher is used to
shapes.py      what files of an unfinished job look like
layers.py      what a recipe asks for of layers, with the teacher's numbers
stages.py      the two stages on Ray: tokenising tasks, teacher actors
job_facts.py   `Job`: what these need to know
supervisor.py  goes on where a teacher's process raises, dies or hangs, and finds the row to blame
attempts.py    the search for that row, in files that outlive who searches
teacher_process.py  that process: holds the teacher, and computes units
unit_tokens.py one unit through its first stage: its documents as token rows
units.py       one unit through its second stage: capture and write, as plain functions
commit.py      records of finished units → audit, digests, card, manifest
"""
