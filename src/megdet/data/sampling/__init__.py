"""How often images come: rare classes, weights of images, and the order of an epoch."""
