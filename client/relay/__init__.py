"""The process that talks to the network, and has no data."""
