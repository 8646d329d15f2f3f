"""Whether a run is what it claims to be: its ledger, the files beside it, and stretches of it computed again."""
