"""Tasks, one in each file: network, loss, metrics, preprocessing, data schema."""
