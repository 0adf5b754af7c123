"""A verified model at work."""
