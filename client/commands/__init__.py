"""Sub-commands of a site: ``fedge site``."""
