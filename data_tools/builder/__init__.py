"""Documents to token stores: units, segments, duplicates, merging, report."""
