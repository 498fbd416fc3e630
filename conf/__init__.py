"""The configuration tree, as YAML. Hydra finds it as pkg://megalite.conf."""
