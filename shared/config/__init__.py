"""The run's configuration: sections, rules, reading and messages."""
