"""Standard streams, threads, open files and environment of a process; processes seen from it."""
