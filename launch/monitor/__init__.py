"""`megalite jobs` and `megalite logs`: what can be read of runs, alive or dead."""
