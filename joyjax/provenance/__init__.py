"""How a picture was made: recipes and fingerprints of checkpoints."""
