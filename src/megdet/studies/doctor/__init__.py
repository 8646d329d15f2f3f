"""Whether this machine is fit to train: findings, each with a state and a next step."""
