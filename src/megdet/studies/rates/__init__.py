"""How high the learning rate may be."""
