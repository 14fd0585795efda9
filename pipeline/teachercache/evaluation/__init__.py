"""The comparison table: teacher, student before and student after, on the held-out rows of a cache; on request also a student
that learned without the teacher.

    table.py     measurements, each in a process of its own, and what users quote of them
    recipe.py    the same for a recipe or the folder of a training run
    rendering.py the table for people
    measure.py   `python -m teachercache.evaluation.measure`: one model, one process, one JSON object
    quality.py   loss, accuracy and agreement with the teacher on held-out positions
    cost.py      latency, throughput and memory

fidelity.py is another question: how near what a cache stores is to its teacher, which runs again on some rows;
layer_fidelity.py asks it of hidden states and attention.

A process that measures loads one model and nothing else: no measurement is disturbed by another model's memory or
threads, and the student's are taken without the teacher anywhere near.
"""

from teachercache.evaluation.recipe import run_evaluation
from teachercache.evaluation.rendering import render
from teachercache.evaluation.table import ModelSpec, evaluate

__all__ = ["ModelSpec", "evaluate", "render", "run_evaluation"]
