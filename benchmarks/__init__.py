"""What distrain costs, beside a bare loop and beside its peers; `make bench` runs all of it."""
