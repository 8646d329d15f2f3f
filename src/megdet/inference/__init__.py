"""Detections of images."""
