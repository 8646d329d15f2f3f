"""What a recipe needs, from steps measured here."""
