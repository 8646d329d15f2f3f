"""From a gradient to a step: optimizers, AGVM, averages of weights, the gradient noise scale."""
