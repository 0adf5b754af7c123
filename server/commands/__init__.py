"""The coordinator's sub-commands."""
