"""Lowers a bundle's networks to ahead-of-time compiled kernels and the plan that launches them."""
