"""Servers that deviate: what they learn from Flower's own secure aggregation, and from ours."""
