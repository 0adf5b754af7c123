"""What the site's administrator wrote: site.toml and policy.toml."""
