"""Synthetic replay: rows made by a fine-tuned model alone, with its soft outputs, to learn from without task data.

Privacy: the rows are made from a model's weights and may reflect the data it was trained on. Whoever takes a model out
of a merge has to delete its replay rows as well; each file names the one model that it was made from.
"""
