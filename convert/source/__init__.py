"""What a path or a hub id holds: checkpoints, single files, adapters, and what is none of these."""
