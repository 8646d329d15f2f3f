"""Exported detectors at work, without torch: the file, its pictures in, its detections out."""
