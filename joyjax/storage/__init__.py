"""How weights are stored in memory."""
