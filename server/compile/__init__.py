"""A finished run's model, compiled for its targets and qualified: what `fedge compile` does."""
