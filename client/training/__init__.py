"""Local training, evaluation and calibration on a site's examples."""
