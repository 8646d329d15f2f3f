"""The variance of gradients (Sec. 3.2)."""
