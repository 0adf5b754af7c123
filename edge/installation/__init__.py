"""Installations by `fedge-edge install`: artefacts qualified and engines built on this device."""
