"""Flower's Grid, with deadlines and resends; nothing about learning."""
