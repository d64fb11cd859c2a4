"""How a kernel is stored: as an array, or in few bits, as another type of leaf."""
