"""Drivers of `megalite data ...`."""
