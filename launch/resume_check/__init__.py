"""`megalite resume-check`: does an interruption change the numbers of a run?"""
