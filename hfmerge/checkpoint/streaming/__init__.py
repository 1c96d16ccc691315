"""Weight files read from the Hub by byte ranges and not stored."""
