"""Configuration: YAML composed by Hydra -> strict loader -> validated, frozen dataclasses. Imports no torch."""
