"""What a recipe needs: described, planned from steps measured here, simulated from published numbers."""
