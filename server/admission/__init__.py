"""Whether a site's reply is acceptable, and why not."""
