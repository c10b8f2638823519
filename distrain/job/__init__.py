"""One rank's part of a run: build the objects, train, report the outcome."""
