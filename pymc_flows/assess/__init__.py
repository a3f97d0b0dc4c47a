"""Assess approximate posteriors: diagnosis, comparison, calibration, and plots."""
