"""Benchmarks: what this machine and this program do, measured in one run.

What measures belongs here, side by side with what it is compared with; nothing that a training uses.
"""
