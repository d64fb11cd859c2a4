"""Weights: reading safetensors, renaming tensors by one table per component, and Orbax folders in and out."""
