"""What is asked: the recipe from a file or from flags, every value checked."""
