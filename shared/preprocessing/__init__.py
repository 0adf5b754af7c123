"""Preprocessing of raw values for a network: schema and steps."""
