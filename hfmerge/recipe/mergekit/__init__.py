"""mergekit's YAML, read as a recipe of ours."""
