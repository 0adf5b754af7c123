"""The simulation's sub-commands."""
