"""Trackers: where the numbers and pictures of a run go besides its folder; one file a tracker."""
