"""How good a posterior is: diagnosis, comparison, calibration and their plots."""
