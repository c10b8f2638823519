"""What belongs to one process: streams, threads, descriptors, environment."""
