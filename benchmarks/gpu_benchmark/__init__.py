"""The parts of `benchmarks/gpu.py`: its sections, and what runs and reports them."""
