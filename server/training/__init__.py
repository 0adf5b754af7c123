"""The round loop: select, train, aggregate, evaluate, commit."""
