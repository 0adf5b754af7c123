"""A site's examples: reading, partitioning, seeding."""
