"""What every component may use: configuration, errors, tasks, bundle, command line."""
