"""The detector, one file a box of the figure."""
