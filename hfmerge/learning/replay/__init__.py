"""Synthetic replay: rows made by a fine-tuned model alone, with its soft outputs, to learn from without task data.

Privacy: the rows are made from a model's weights and may reflect the data it was trained on. When a model is
taken out of a merge, its replay rows must be deleted as well. Each file names the model that it was made from.
"""
