"""What a run can be asked: its gradients, its samples, its learning rate."""
