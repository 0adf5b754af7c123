"""The signed bundle: its format, its manifest, and how it is verified."""
