"""A site's examples: read, divided, drawn."""
