"""Updates in, model out: strategies, the server's noise and what it costs. No network."""
