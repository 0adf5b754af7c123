"""The device: verify a signed bundle, run it, time it. Needs neither torch nor flwr."""
