"""How models relate before they are merged."""
