"""The processes of a site: set up, started, supervised, stopped."""
