"""Produce AiM checkpoints: the two networks, their training, reading published files."""
