"""systemd units of a site."""
