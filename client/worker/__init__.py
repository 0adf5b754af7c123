"""The process that holds the data, and has no network."""
