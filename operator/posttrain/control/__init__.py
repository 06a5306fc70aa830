"""The operator in a cluster: all its I/O, around the pure plan."""
