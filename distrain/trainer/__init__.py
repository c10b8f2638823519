"""The training loop, its hooks and its step."""
