"""systemd units of the server."""
