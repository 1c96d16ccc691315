"""Benchmarks: times hfmerge against other tools, each in an environment of its own; see README.md."""
