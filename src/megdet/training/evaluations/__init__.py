"""The evaluations of a run, by all ranks together or in a process of their own."""
