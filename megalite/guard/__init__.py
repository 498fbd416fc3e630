"""What protects a run from the world around it; knows nothing of the engine."""
