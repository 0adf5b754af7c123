"""Backends that run artefacts on this device, the choice among them, and trials in child processes."""
