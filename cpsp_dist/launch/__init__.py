"""Training as Slurm jobs, or as ranks of this machine, through submitit.

What submits, follows and requeues jobs belongs here; the only package that imports submitit.
"""
