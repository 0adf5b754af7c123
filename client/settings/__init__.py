"""The settings of the site's administrator: site.toml and policy.toml."""
