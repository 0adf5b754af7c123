"""The resident server: its processes, certificates, known sites and queue of runs."""
