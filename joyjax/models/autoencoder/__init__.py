"""Picture autoencoders, and their application to pictures of many sizes."""
