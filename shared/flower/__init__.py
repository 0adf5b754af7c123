"""Flower's bundle, and a patch of Flower's private functions."""
