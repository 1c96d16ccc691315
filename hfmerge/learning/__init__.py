"""Learning of weights by gradient: the rows to learn from, and the optimisation."""
