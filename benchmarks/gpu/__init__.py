"""The parts of `gpu_sweep.py`: facts of the machine, parity, host synchronisation, throughput."""
