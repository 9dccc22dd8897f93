"""One run, from resume to the last evaluation: loop, engines, checkpoints, schedule, diagnostics.

What happens between reading a batch and writing a result belongs here.
"""
