"""The search: from a job to a confirmed front.

`evaluation.py` is the spine: what happens to one candidate. `runner.py` is the loop of one
job around it.
"""
