"""From pictures and prompts to arrays, on the host."""
