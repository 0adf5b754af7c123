"""A site's own noise, and the ledger that pays for it."""
