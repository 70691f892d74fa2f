"""Lower a checkpoint to a bundle: ONNX graphs, weights, manifest."""
