"""What happened: entries, a merge that exists, its history, differences, and the card."""
