"""The paper's tables and figures: as printed, and reproduced."""
