"""Looks at the runs in a folder, stops them and resumes them; asks their files and SLURM only."""
