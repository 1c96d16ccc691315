"""Which stored tensor of one checkpoint is which of another, and what it holds: the door to transformers' names.

Everything follows from config.json and the shapes in the headers. Two checkpoints are compared by the names that
parameters have in memory, because stored names differ between versions of transformers, between classes (`bert.` or
not) and between file layouts (one file tensor per expert, or one for all).

`describe` (layout.py) builds the class on the meta device (skeleton.py), pairs stored keys with its parameters
(loader.py) and finds real matrices (blocks.py); `match` (match.py) compares two layouts; `load_back` (loadback.py)
asks transformers itself about a finished folder.
"""

from hfmerge.checkpoint.layout import Layout, describe
from hfmerge.checkpoint.loadback import load_back
from hfmerge.checkpoint.match import Match, Origin, match


__all__ = ["Layout", "Match", "Origin", "describe", "load_back", "match"]
