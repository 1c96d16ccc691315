"""Jinja templates of the model card and the licence note."""
