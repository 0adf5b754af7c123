"""Qualified on this device, and noted: what `fedge-edge install` writes."""
