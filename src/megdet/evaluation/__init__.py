"""COCO numbers of a trained detector."""
