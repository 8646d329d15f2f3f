"""A step of a run, made again from the checkpoint before it, and looked at."""
