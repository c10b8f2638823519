"""Model weights alone: read from anywhere, loaded into a model."""
