"""The options of every verb; quick to import, so that help and errors come at once."""
