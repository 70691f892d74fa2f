"""Triton kernels of the training step, each beside the plain PyTorch twin it is tested against.

What a layer does outside its two matrix products: `add_norm` between mixers,
`convolution`, `dual` and `gated_norm` inside them, joined to one operator by
`mixer`; and `cross_entropy` at the end. The functions take the kernels where they can
run, on a GPU with Triton, and the twins elsewhere. Kernels compute in float32 and round to the
dtype of what they write; their sums have one order, so that training is the same bit for bit each
time.
"""
