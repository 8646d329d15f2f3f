"""The options of every verb; nothing here computes, so that help and errors come at once."""
