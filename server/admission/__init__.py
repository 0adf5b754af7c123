"""Validation of the sites' replies."""
