"""Flower's Grid with deadlines and retries; independent of machine learning."""
