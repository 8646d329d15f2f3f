"""The run folder: every format written and read in one place."""
