"""`python -m distrain.evaluate`: evaluate a run's checkpoint without training."""
