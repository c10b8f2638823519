"""Hydra's configuration -> a checked plain dict -> objects."""
