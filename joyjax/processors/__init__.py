"""Prompts and pictures as the arrays that text encoders take."""
