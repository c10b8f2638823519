"""Scalars, images and histograms: recorded, reduced over ranks, kept in histories."""
