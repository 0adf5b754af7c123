"""The sections of the report's page, each a file."""
