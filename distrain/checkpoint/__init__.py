"""Checkpoints: saved in the background, verified, loaded, kept and deleted."""
