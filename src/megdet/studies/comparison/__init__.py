"""Runs compared: what differs in their recipes, and whether their scores differ by more than noise."""
