"""Who takes part in secure aggregation: a signed list of keys."""
