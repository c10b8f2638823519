"""Command `python -m distrain.runs`: table, show, diff, plot, stop, resume."""
