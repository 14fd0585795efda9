"""Callbacks: work between the steps of a run.

log_and_save.py        when it logs, evaluates and saves
meter.py               loss terms of a logging window, over micro-batches and processes
record.py              the record of a window, as log.jsonl and trackers get it
progress.py            progress bar and log.jsonl
step_losses.py         what follows the losses of steps, and is saved with checkpoints
stop_on_divergence.py  ends a run that cannot learn any more
preemption.py          SIGTERM: finish the step, save, end
"""
