"""`python -m distrain.tune`: a sweep that stops the worse runs early."""
