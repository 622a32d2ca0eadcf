"""Everything that is kept: jobs, trials, measurements, devices, artifacts, events.

The tables here are the truth of the system; an Optuna study or a Ray task is a disposable
view of them. Rows never leave this package: callers see the frozen records of `records.py`.
"""
