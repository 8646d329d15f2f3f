"""What the paper's tables and figures need."""
