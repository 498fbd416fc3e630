"""`megalite report`: a run's curves as one page."""
