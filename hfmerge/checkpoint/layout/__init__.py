"""The names of stored tensors: which tensor of one checkpoint is which of another, and which matrices it holds.

Everything follows from config.json and the shapes in the headers. Two checkpoints are compared by the names that
parameters have in memory, because stored names differ between versions of transformers, between classes (`bert.` or
not) and between file layouts (one file tensor per expert, or one for all).

`layout.describe_layout` builds the class on the meta device (`skeleton`), pairs stored keys with parameters
(`conversion`) and finds real matrices (`blocks`). `correspondence.match` compares two layouts. `load_check.load_back`
asks transformers itself about a finished folder. `cache` keeps what transformers said.
"""

from hfmerge.checkpoint.layout.correspondence import Convert, Match, Origin, match
from hfmerge.checkpoint.layout.layout import Layout, describe_layout, with_modules
from hfmerge.checkpoint.layout.load_check import load_back


__all__ = ["Convert", "Layout", "Match", "Origin", "describe_layout", "load_back", "match", "with_modules"]
