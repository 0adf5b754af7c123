"""The coordinator: round loop, admission, strategies, journal, release."""
