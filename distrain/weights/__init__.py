"""Model weights without the rest of a run: read, and load into a model."""
