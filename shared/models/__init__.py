"""Networks, one family in each file."""
