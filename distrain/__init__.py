"""distrain: a distributed training service."""
