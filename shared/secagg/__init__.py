"""Secure aggregation: see docs/explanation/secure-aggregation.md."""
