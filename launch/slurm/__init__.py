"""`launch=slurm`: the batch script, its submission, and what runs on the nodes."""
