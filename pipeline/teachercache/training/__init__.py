"""The training job: a cache and a student in, a plain Hugging Face folder out. No part of it loads the teacher.

job/           a recipe from its first check to its exported student: launching, settings, OUTPUT, export
trainer/       `DistillationTrainer`, its loss, and evaluation on held-out rows
supervision/   what a run learns from, and whether the student fits it
callbacks/     what happens between steps: logging, saving, stopping, progress
checkpoints/   which are whole, and going on from one with any number of processes
initialise/    a student from a model's own layers, another vocabulary, adapters, parts
"""
