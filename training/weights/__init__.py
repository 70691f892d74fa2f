"""Weights in strangers' files: found, told apart, and read without running anything in them.

`open_weights` reads names, types, shapes and places of a file's tensors; bytes are read a
tensor at a time, when `StoredTensor.read` is called. All of it is Python over plain reads:
no file is mapped into memory, so one that is overwritten meanwhile cannot stop the process, and no
unpickler ever builds an object of the file's choosing.
"""

from __future__ import annotations

from aim_training.weights.open import OpenedWeights, find_weights, open_weights
from aim_training.weights.stored import CheckpointError, StoredTensor

__all__ = ["CheckpointError", "OpenedWeights", "StoredTensor", "find_weights", "open_weights"]
