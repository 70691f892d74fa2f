"""Triton kernels, each beside the plain reference it is tested against.

Run-time parameters are pointers only, sizes are compile-time constants: a launch is then a kernel,
a grid and a list of addresses, which a plan can state as data.
"""
