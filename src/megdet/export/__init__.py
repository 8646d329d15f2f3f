"""Detectors as files that run elsewhere: the graph, the file, and the proof that it finds the same."""
