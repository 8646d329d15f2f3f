"""Augmentations that need more than one image: what the plan draws, and what is done to pixels and targets."""
