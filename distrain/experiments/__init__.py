"""The three experiments that come with distrain: each file holds a data set and a model."""
