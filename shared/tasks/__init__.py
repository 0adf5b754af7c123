"""Tasks, one a file: network, loss, metrics, preprocessing, data schema."""
