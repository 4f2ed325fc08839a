"""The parts of `benchmarks/gpu_run.py`, one module a part; each runs in a process of its own."""
