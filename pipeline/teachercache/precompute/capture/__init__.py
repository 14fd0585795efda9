"""The precompute job: corpus → staged units → tokens → teacher actors → shards → manifest.

job.py         the whole job, `run_precompute`
plan.py        what the job is: identity (fingerprint); decides between new, resumed and finished
given_calibration.py  basis and layer files that another cache has
input_form.py  whether rows begin as the teacher is used to
shapes.py      what files of an unfinished job look like
layers.py      what a recipe asks for of layers, with the teacher's numbers
staging.py     the corpus as files of raw documents, one a work unit
stages.py      the two stages on Ray: tokenising tasks, teacher actors
job_facts.py   `Job`: what these need to know
supervisor.py  goes on where a teacher's process raises, dies or hangs, and finds the row to blame
attempts.py    the search for that row, in files that outlive who searches
teacher_process.py  that process: holds the teacher, and computes units
units.py       one unit through its two stages, as plain functions: tokenise; capture and write
commit.py      records of finished units → audit, digests, card, manifest
"""
