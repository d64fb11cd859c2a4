"""Compiled programs that are kept on disk, and found again without tracing."""
