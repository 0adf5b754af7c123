"""From raw values to what a network takes: schema and steps."""
