"""The resident server: its processes, certificates, site registry and run queue."""
