"""``fedge audit``: an attack on the mechanism that a configuration names, run by ourselves."""
