"""Benchmarks of the data tools and of loading, with peers in the same run."""
