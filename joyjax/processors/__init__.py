"""Prompts and pictures as the inputs of text encoders."""
