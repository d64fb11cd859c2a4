"""Model families: what turns a request into arrays, and which networks it runs."""
