"""Training as Slurm jobs, or as ranks of this machine, through submitit. The only room that knows it."""
