"""Differential privacy: noise, what it is worth, and what has been spent."""
