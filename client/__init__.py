"""The site: the relay that Flower runs, and the resident worker that holds the data."""
