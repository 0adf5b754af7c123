"""Examples from files: bounded and checked against the schema."""
