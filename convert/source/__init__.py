"""Identification of model sources, by path or hub id: checkpoints, single files, adapters and anything else."""
