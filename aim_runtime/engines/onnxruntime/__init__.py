"""The CPU and CUDA backends of ONNX Runtime, and the engine that they share."""
