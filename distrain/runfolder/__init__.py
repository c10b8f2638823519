"""Everything in a run folder but its checkpoints."""
