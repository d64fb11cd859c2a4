"""Training by flow matching, with the networks, data and mesh of inference."""
