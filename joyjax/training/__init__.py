"""Training: flow matching on the same networks, data and mesh that inference runs on."""
