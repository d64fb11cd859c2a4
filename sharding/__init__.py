"""Logical axis names, the device mesh, and the sharding of parameters and activations."""
