"""Terminal output while a run goes on, and at its end."""
