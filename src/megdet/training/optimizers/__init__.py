"""What makes a step of a gradient: optimizers, AGVM, averages of weights, the gradient noise scale."""
