"""Picture autoencoders, and how they are applied to pictures of many sizes."""
