"""Continual merging, measured: models arrive one after another in several orders, and leave again."""
