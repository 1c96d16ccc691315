"""The command line: `main` runs one command. `program` builds the parser; each family of commands has a file."""

from hfmerge.cli.program import main


__all__ = ["main"]
