"""A run on disk: its directory, journal, checkpoints, events and results."""
