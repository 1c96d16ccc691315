"""The commands, a family a file: each `register` adds its parsers, each handler calls one verb and prints."""
