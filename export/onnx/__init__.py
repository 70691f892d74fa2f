"""Lowering to ONNX: the prologue, the step and the decoder as graphs."""
