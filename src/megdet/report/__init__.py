"""One page that tells everything of one run or of several: `megdet report`."""
