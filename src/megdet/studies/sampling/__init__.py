"""Positives and negatives (Table 1, Figure 2)."""
