"""Model families: how a request becomes arrays, and which networks it runs."""
