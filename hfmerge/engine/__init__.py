"""From a recipe to written weights: the plan, how it is divided, and the run."""
