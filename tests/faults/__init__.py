"""Tools that make a network bad, and the tests of what must survive it."""
