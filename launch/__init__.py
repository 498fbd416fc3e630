"""The `megalite` command and the drivers that start ranks. Importing this package imports no torch."""
