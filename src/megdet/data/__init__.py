"""The images: formats, checks, the plan, loading."""
