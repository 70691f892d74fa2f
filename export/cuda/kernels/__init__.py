"""Triton kernels of the CUDA plans: `step`, `scan`, `sample`, `decoder` and what they share.

Run-time parameters are pointers only, sizes are compile-time constants: a launch is then a kernel,
a grid and a list of addresses, which a plan can state as data. The comment behind a pointer says
its axes and, where it is fixed, its type. What each kernel computes is written plainly in the tests
(tests/export), which hold it to that in Triton's interpreter.

Letters are those of docs/engines.md: R rows, T tokens, V codes, L layers, D width, I = 2D inner
channels, H heads of P channels, S state size, K convolution width, X = I + 2S, E = I + X + H
outputs of `in_proj`, C tokens a chunk.

Functions that no launch names are parts of kernels, inlined where they are called. Masks such as
`inner >= 0` are always true and forbid nothing: without them Triton makes other machine code than
that which the published figures were measured with.
"""
