"""The time of a training on clusters, simulated."""
