"""What noise is worth: epsilon, against whom, and what is charged."""
