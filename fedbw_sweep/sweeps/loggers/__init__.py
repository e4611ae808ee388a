"""Where each round's numbers go besides a run's own files: one file a logger."""
