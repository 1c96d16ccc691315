"""Access to the Hub: its client and errors, references, downloads, byte ranges, commits, the branch of states."""
