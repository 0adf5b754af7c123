"""The processes of a site: made, started, watched, stopped."""
