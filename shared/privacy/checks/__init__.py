"""Whether a task suits a mechanism."""
