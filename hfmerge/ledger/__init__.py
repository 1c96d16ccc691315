"""The ledger, read only: entries, opened merges, history, differences, and the card."""
