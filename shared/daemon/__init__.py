"""Long-running processes: supervision, launching, sockets. Needs no torch; Flower only where it is launched."""
