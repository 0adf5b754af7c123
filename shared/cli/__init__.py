"""The command line's entry point, and what a sub-command is."""
