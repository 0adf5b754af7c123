"""A site's hash-chained record of what it has spent."""
