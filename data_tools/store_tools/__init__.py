"""Tools for token stores that exist: repair, stats, merge, split. None changes a store in place."""
