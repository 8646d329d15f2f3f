"""Studies of a run: its gradients, its samples, its learning rate."""
