"""Loading a model and running requests on it."""
