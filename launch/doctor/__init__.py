"""`megalite doctor`: is this machine fit to run?"""
