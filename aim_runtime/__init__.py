"""Run AiM bundles: pictures from a class name on a CPU, without PyTorch."""
