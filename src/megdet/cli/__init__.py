"""The command line: one verb a function, no mathematics."""
