"""The approximate posterior: draws, log densities, files and corrections."""
