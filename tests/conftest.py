"""Shared set-up: the slow imports once, one thread, so that ranks can be forked from this process at any time."""

import os

# Before torch is imported: forked ranks share two cores, and a thread pool would not survive the fork.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import torch

from megalite.engine import preload

torch.set_num_threads(1)
preload()
