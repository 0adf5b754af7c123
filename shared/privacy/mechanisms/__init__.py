"""The noise itself: Gaussian, discrete, local, distributed, correlated."""
