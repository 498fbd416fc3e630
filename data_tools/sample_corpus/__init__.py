"""The corpus that the quickstart trains on."""
