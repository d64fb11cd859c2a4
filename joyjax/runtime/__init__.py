"""Loading a model and running requests on it: the engine and what it needs."""
