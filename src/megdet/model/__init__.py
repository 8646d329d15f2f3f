"""The detectors; each part of the network has a file of its own."""
