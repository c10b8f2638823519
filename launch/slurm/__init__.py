"""launch=slurm: jobs, attempts and nodes of SLURM."""
