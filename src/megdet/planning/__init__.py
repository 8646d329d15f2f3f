"""What a recipe needs: its arithmetic, a plan from steps measured here, a simulation from published numbers."""
