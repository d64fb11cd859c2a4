"""Where arrays live: logical axis names, the mesh, and the placement of parameters and activations."""
