"""What the engines on NVIDIA GPUs share. It imports none of them.

- `libcuda`, `probing`: which GPUs are here and whether they will do, before anything is loaded.
- `device`: what an engine asks of a GPU; `driver` fulfils it through cuda-bindings.
- `workspace`, `pool`: what a request has on the device, and what is kept of it for the next.
- `engine`, `rows`: the base of such an engine, and of the rows that the host steps on it.
- `architecture`: which compiled kernels a GPU can run.
"""
