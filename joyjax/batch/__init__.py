"""Many edits from a file of requests."""
