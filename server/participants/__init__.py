"""Which sites there are, which are there, and asking them."""
