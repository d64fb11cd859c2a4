"""Shared pieces of the networks."""
