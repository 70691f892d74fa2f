"""Whatever computes a bundle's graphs: engines, and the backends that make them.

- `base`: the seam. `Engine` checks arguments and draws; an engine fills the rest.
- `backends`: the backends by name, which of them can run here, and the choice that "auto" makes.
- `onnxruntime`: any bundle on a CPU, or on an NVIDIA GPU without kernels of ours.
- `gpu`: what the engines on NVIDIA GPUs share; `cuda` (kernels of ours) and `tensorrt` build on it.

To add an engine: a module or package here with the two functions of a backend (see `backends`) and
a subclass of `Engine`, on an NVIDIA GPU of `gpu.engine.GpuEngine`; its line in the table of
`backends`; its name in tests/runtime/test_engine_contract.py, which holds it to all that engines
promise.
"""
