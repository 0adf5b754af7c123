"""Sub-commands that belong to no component."""
