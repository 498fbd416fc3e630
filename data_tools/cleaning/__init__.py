"""Cleaning: an explicit list of steps, each a small class whose fields are its options.

A step looks at one document and gives back its text, changed or not, or says why the document is dropped. It keeps
nothing between documents, so documents can be cleaned in any order by any number of processes.
"""

from .pipeline import STEPS, Cleaner, build_cleaner, describe_steps

__all__ = ["STEPS", "Cleaner", "build_cleaner", "describe_steps"]
