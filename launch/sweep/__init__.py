"""`megalite train -m`: several trainings by one command, and their table."""
