"""Flower's bundle, and what is touched of Flower's privates."""
