"""NVIDIA GPUs: kernels compiled ahead of time, launched as the bundle's plan says."""
